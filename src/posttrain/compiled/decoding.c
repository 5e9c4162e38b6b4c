/* What stands between the matrix products of one decoding step, for one CPU thread: plain C, no headers but the standard
 * library's, called through ctypes.  The arithmetic is float32; bfloat16 tensors are read and written as such.
 *
 * Axes: rows, D width, I inner width, heads = kv * share query heads, d head width (a multiple of 16, at most 256),
 * C columns of the cache (a multiple of 32).
 */
#include "common.h"

/* x += y where there is a y, then out = x / rms(x) * weight. */
void add_norm(float *x, const void *y, int y_narrow, const float *weight, void *out, int out_narrow, int64_t rows, int64_t D,
              float eps, float *restrict scratch) {
    for (int64_t b = 0; b < rows; b++) {
        float *row = x + b * D;
        if (y) {
            load(y, y_narrow, b * D, D, scratch);
            for (int64_t i = 0; i < D; i++) row[i] += scratch[i];
        }
        float scale = 1.0f / sqrtf(squares(row, D) / (float)D + eps);
        for (int64_t i = 0; i < D; i++) scratch[i] = row[i] * scale * weight[i];
        store(out, out_narrow, b * D, D, scratch);
    }
}

/* out = silu(gate) * up of wide = [gate, up]. */
void swiglu(const void *wide, int wide_narrow, void *out, int out_narrow, int64_t rows, int64_t I, float *restrict scratch) {
    float *restrict gate = scratch, *restrict up = scratch + I;
    for (int64_t b = 0; b < rows; b++) {
        load(wide, wide_narrow, b * 2 * I, I, gate);
        load(wide, wide_narrow, b * 2 * I + I, I, up);
        for (int64_t i = 0; i < I; i++) {
            float g = gate[i], e = exponential(g < 0 ? g : -g);
            gate[i] = rounded(g * (g < 0 ? e : 1.0f) / (1.0f + e), out_narrow) * up[i];
        }
        store(out, out_narrow, b * I, I, gate);
    }
}

/* One head of `mixed`, normed where there is a weight and rotated. */
static inline void head_at(const void *mixed, int is_narrow, int64_t at, const float *weight, float eps, const float *cosine,
                           const float *sine, int64_t d, float *out) {
    float before[DEEPEST];
    load(mixed, is_narrow, at, d, before);
    if (weight) {
        float scale = 1.0f / sqrtf(squares(before, d) / (float)d + eps);
        for (int64_t i = 0; i < d; i++) before[i] = before[i] * scale * weight[i];
    }
    rotated(before, cosine, sine, 1.0f, d, out);
}

/* What R queries of one row find in the cache: queries [R][d], keys [d][C], values from place `start` on [C][d]; out [R][d]. */
INLINE void found(const int R, const float *queries, const float *keys, const void *values, int is_narrow, int64_t start, int64_t d,
                  int64_t C, float scale, int64_t first, int64_t last, float *p, float *out) {
    int64_t from = first / COLUMNS * COLUMNS, to = last / COLUMNS * COLUMNS + COLUMNS;
    float columns[QUERIES * DEEPEST];
    for (int64_t i = 0; i < d; i++)
        for (int r = 0; r < R; r++) columns[i * R + r] = queries[r * d + i] * scale;
    for (int64_t j = from; j < to; j += COLUMNS) sums(R, columns, 1, R, keys, 0, j, C, d, p + j, C);
    float inverse[QUERIES], most;
    for (int r = 0; r < R; r++) inverse[r] = 1.0f / row_softmax(p + r * C, first, last, from, to, &most);
    if (is_narrow) mixture(R, p, values, 1, start, d, from, last + 1, C, out); /* a constant inside */
    else mixture(R, p, values, 0, start, d, from, last + 1, C, out);
    for (int r = 0; r < R; r++)
        for (int64_t i = 0; i < d; i++) out[r * d + i] *= inverse[r];
}

/* One token a row: queries, keys and values of `mixed` [rows, heads + 2 kv, d] are normed (where there are weights) and
 * rotated, keys [rows * kv, d, C] and values [rows * kv, C, d] get the token at its position, and every query looks at the
 * tokens before it (the last `window` of them, or all at 0).  out: [rows, heads * d]; scratch: [4 * C]. */
void attend(const void *mixed, int mixed_narrow, const float *cosine, const float *sine, const int64_t *positions, float *keys,
            void *values, int values_narrow, void *out, int out_narrow, const float *q_norm, const float *k_norm, float eps,
            int64_t rows, int64_t kv, int64_t share, int64_t d, int64_t C, float scale, int64_t window, float *scratch) {
    int64_t heads = kv * share;
    float queries[QUERIES * DEEPEST], results[QUERIES * DEEPEST];
    for (int64_t b = 0; b < rows; b++) {
        int64_t last = positions[b], first = window > 0 && last >= window ? last - window + 1 : 0;
        const float *c = cosine + last * d, *s = sine + last * d;
        int64_t row = b * (heads + 2 * kv) * d;
        for (int64_t g = 0; g < kv; g++) {
            float *own = keys + (b * kv + g) * d * C;
            int64_t start = (b * kv + g) * C * d;
            head_at(mixed, mixed_narrow, row + (heads + g) * d, k_norm, eps, c, s, d, queries);
            for (int64_t i = 0; i < d; i++) own[i * C + last] = queries[i];
            load(mixed, mixed_narrow, row + (heads + kv + g) * d, d, queries);
            store(values, values_narrow, start + last * d, d, queries);
            for (int64_t h = g * share, R; h < (g + 1) * share; h += R) {
                int64_t left = (g + 1) * share - h;
                R = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                for (int64_t r = 0; r < R; r++)
                    head_at(mixed, mixed_narrow, row + (h + r) * d, q_norm, eps, c, s, d, queries + r * d);
#define FOUND(R) found(R, queries, own, values, values_narrow, start, d, C, scale, first, last, scratch, results)
                if (R == 4) FOUND(4);
                else if (R == 2) FOUND(2);
                else FOUND(1);
                store(out, out_narrow, (b * heads + h) * d, R * d, results);
            }
        }
    }
}

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef double d8 __attribute__((vector_size(64), aligned(8)));
enum { BLOCK = 128, BLOCKS = 4096 };

/* One token a row by inverting the running sum of exp(logits / temperature), as `draw.invert` does: the first entry whose
 * running sum is above u * total.  tokens: -1 where the total is not finite.  V is at most BLOCK * BLOCKS. */
void draw(const float *logits, const double *uniforms, int64_t *tokens, float *logprobs, int64_t rows, int64_t V,
          float temperature, float *restrict weights) {
    static _Thread_local double sums[BLOCKS];
    for (int64_t b = 0; b < rows; b++) {
        const float *row = logits + b * V;
        float most = row[0] / temperature;
        double all = 0.0;
        for (int64_t i = 0; i < V; i++) {
            weights[i] = row[i] / temperature;
            most = weights[i] > most ? weights[i] : most;
        }
        for (int64_t start = 0; start < V; start += BLOCK) {
            int64_t end = start + BLOCK < V ? start + BLOCK : V, i = start;
            for (int64_t j = start; j < end; j++) {
                float below = weights[j] - most;
                weights[j] = below < -87.0f ? 0.0f : exponential(below);
            }
            d8 sum = {0};
            for (; i + 8 <= end; i += 8) sum += __builtin_convertvector(*(const f8 *)(weights + i), d8);
            double own = 0.0;
            for (int lane = 0; lane < 8; lane++) own += sum[lane];
            for (; i < end; i++) own += weights[i];
            all += sums[start / BLOCK] = own;
        }
        if (!(all > 0.0 && all <= 1e300)) {
            tokens[b] = -1;
            logprobs[b] = NAN;
            continue;
        }
        double wanted = uniforms[b] * all, running = 0.0;
        if (wanted >= all) wanted = nextafter(all, 0.0);
        int64_t block = 0, last = (V - 1) / BLOCK, chosen = -1;
        while (block < last && running + sums[block] <= wanted) running += sums[block++];
        int64_t end = (block + 1) * BLOCK < V ? (block + 1) * BLOCK : V;
        for (int64_t i = block * BLOCK; i < end; i++) {
            if (weights[i] > 0.0f) chosen = i; /* rounding may leave the running sum at the bound: then the last that can be */
            running += weights[i];
            if (running > wanted) break;
        }
        if (chosen < 0) { /* nothing in this block can be drawn: the likeliest token */
            for (int64_t i = 0; i < V; i++)
                if (chosen < 0 || weights[i] > weights[chosen]) chosen = i;
        }
        tokens[b] = chosen;
        logprobs[b] = (float)((double)(row[chosen] / temperature - most) - log(all));
    }
}
