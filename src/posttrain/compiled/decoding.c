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

static inline void turned(float *x, const float *weight, float eps, const float *cosine, const float *sine, int64_t d) {
    float before[256];
    if (weight) {
        float scale = 1.0f / sqrtf(squares(x, d) / (float)d + eps);
        for (int64_t i = 0; i < d; i++) x[i] = x[i] * scale * weight[i];
    }
    memcpy(before, x, d * sizeof(float));
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        x[i] = before[i] * cosine[i] - before[i + half] * sine[i];
        x[i + half] = before[i + half] * cosine[i + half] + before[i] * sine[i + half];
    }
}

/* scores[first .. last] of one query, in blocks of 32 columns from a multiple of 32. */
static inline void score(const float *query, const float *keys, int64_t d, int64_t C, int64_t first, int64_t last, float *scores) {
    for (int64_t j = first / 32 * 32; j <= last; j += 32) {
        v16 one = {0}, two = {0};
        for (int64_t i = 0; i < d; i++) {
            const float *key = keys + i * C + j;
            one += query[i] * *(const v16 *)key;
            two += query[i] * *(const v16 *)(key + 16);
        }
        *(v16 *)(scores + j) = one;
        *(v16 *)(scores + j + 16) = two;
    }
}

static inline void softmax(float *scores, int64_t first, int64_t last) {
    float most = scores[first], sum = 0.0f;
    for (int64_t j = first; j <= last; j++) most = scores[j] > most ? scores[j] : most;
    for (int64_t j = first; j <= last; j++) scores[j] = exponential(scores[j] - most);
    for (int64_t j = first; j <= last; j++) sum += scores[j];
    float scale = 1.0f / sum;
    for (int64_t j = first; j <= last; j++) scores[j] *= scale;
}

static inline v16 sixteen(const void *values, int is_narrow, int64_t at) {
    if (!is_narrow) return *(const v16 *)((const float *)values + at);
    u16v bits = __builtin_convertvector(*(const h16 *)((const bf16 *)values + at), u16v) << 16;
    v16 out;
    memcpy(&out, &bits, 64);
    return out;
}

static inline void weighed(const float *p, const void *values, int is_narrow, int64_t start, int64_t d, int64_t first,
                           int64_t last, float *out) {
    for (int64_t i = 0; i < d; i += 16) {
        v16 even = {0}, odd = {0};
        int64_t j = first;
        for (; j < last; j += 2) {
            even += p[j] * sixteen(values, is_narrow, start + j * d + i);
            odd += p[j + 1] * sixteen(values, is_narrow, start + (j + 1) * d + i);
        }
        if (j == last) even += p[j] * sixteen(values, is_narrow, start + j * d + i);
        *(v16 *)(out + i) = even + odd;
    }
}

/* One token a row: queries, keys and values of `mixed` [rows, heads + 2 kv, d] are normed (where there are weights) and
 * rotated, keys [rows * kv, d, C] and values [rows * kv, C, d] get the token at its position, and every query looks at the
 * tokens before it (the last `window` of them, or all at 0).  out: [rows, heads * d]. */
void attend(const void *mixed, int mixed_narrow, const float *cosine, const float *sine, const int64_t *positions, float *keys,
            void *values, int values_narrow, void *out, int out_narrow, const float *q_norm, const float *k_norm, float eps,
            int64_t rows, int64_t kv, int64_t share, int64_t d, int64_t C, float scale, int64_t window, float *scores) {
    int64_t heads = kv * share;
    float query[256], other[256];
    for (int64_t b = 0; b < rows; b++) {
        int64_t last = positions[b], first = window > 0 && last >= window ? last - window + 1 : 0;
        const float *c = cosine + last * d, *s = sine + last * d;
        int64_t row = b * (heads + 2 * kv) * d;
        for (int64_t g = 0; g < kv; g++) {
            float *own_keys = keys + (b * kv + g) * d * C;
            int64_t start = (b * kv + g) * C * d;
            load(mixed, mixed_narrow, row + (heads + g) * d, d, other);
            turned(other, k_norm, eps, c, s, d);
            for (int64_t i = 0; i < d; i++) own_keys[i * C + last] = other[i];
            load(mixed, mixed_narrow, row + (heads + kv + g) * d, d, other);
            store(values, values_narrow, start + last * d, d, other);
            for (int64_t h = g * share; h < (g + 1) * share; h++) {
                load(mixed, mixed_narrow, row + h * d, d, query);
                turned(query, q_norm, eps, c, s, d);
                for (int64_t i = 0; i < d; i++) query[i] *= scale;
                score(query, own_keys, d, C, first, last, scores);
                softmax(scores, first, last);
                if (values_narrow) {
                    for (int64_t j = first; j <= last; j++) scores[j] = rounded(scores[j], 1);
                    weighed(scores, values, 1, start, d, first, last, other);
                } else {
                    weighed(scores, values, 0, start, d, first, last, other);
                }
                store(out, out_narrow, (b * heads + h) * d, d, other);
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
