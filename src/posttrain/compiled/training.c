/* What stands between the matrix products of a training step, forward and backward, for one CPU thread: plain C, called through
 * ctypes.  The arithmetic is float32; bfloat16 tensors are read and written as such.
 *
 * Axes: rows (tokens) n, D width, I inner width, H = kv * share query heads, d head width (a multiple of 16, at most 256),
 * t queries and S keys of a segment.
 */
#include "common.h"

enum { QUERIES = 8, COLUMNS = 32, DEEPEST = 256 };

/* ---------------------------------------------------------------------------------------------------------------- norms */

/* Where there is a y: to = x + y, and the norm is of that.  scales = 1 / rms(x), out = x * scales * weight. */
void norm_forward(const float *x, const void *y, int narrow_y, float *restrict to, const float *weight, void *out, int narrow_out,
                  float *scales, int64_t rows, int64_t D, float eps, float *restrict scratch) {
    for (int64_t b = 0; b < rows; b++) {
        const float *row = x + b * D;
        if (y) {
            load(y, narrow_y, b * D, D, to + b * D);
            for (int64_t i = 0; i < D; i++) to[b * D + i] += row[i];
            row = to + b * D;
        }
        float scale = scales[b] = 1.0f / sqrtf(squares(row, D) / (float)D + eps);
        for (int64_t i = 0; i < D; i++) scratch[i] = row[i] * scale * weight[i];
        store(out, narrow_out, b * D, D, scratch);
    }
}

/* The gradient of x, to which `past` is added where the sum was used beside its norm, and once more as `grad_y`, where there is
 * one; and that of the weight, which is added to. */
void norm_backward(const void *grad, int narrow, const float *past, const float *x, const float *weight, const float *scales,
                   float *grad_x, void *grad_y, int narrow_y, float *restrict grad_weight, int64_t rows, int64_t D,
                   float *restrict scratch) {
    for (int64_t b = 0; b < rows; b++) {
        const float *row = x + b * D;
        float *restrict out = grad_x + b * D, scale = scales[b];
        v16 along = {0};
        float rest = 0.0f;
        int64_t i = 0;
        load(grad, narrow, b * D, D, scratch);
        for (; i + 16 <= D; i += 16) {
            v16 product = *(v16 *)(scratch + i) * (*(const v16 *)(row + i) * scale);
            *(v16 *)(grad_weight + i) += product;
            along += product * *(const v16 *)(weight + i);
        }
        for (; i < D; i++) {
            float product = scratch[i] * row[i] * scale;
            grad_weight[i] += product;
            rest += product * weight[i];
        }
        float mean = (total(along) + rest) / (float)D * scale; /* x / rms(x) times the mean of grad * weight * x / rms(x) */
        for (i = 0; i < D; i++) out[i] = (scratch[i] * weight[i] - row[i] * mean) * scale;
        if (past)
            for (i = 0; i < D; i++) out[i] += past[b * D + i];
        if (grad_y) store(grad_y, narrow_y, b * D, D, out);
    }
}

/* --------------------------------------------------------------------------------------------------------------- swiglu */

/* grad_wide = d silu(gate) * up / d [gate, up] of wide = [gate, up]. */
void swiglu_backward(const void *grad, int narrow_grad, const void *wide, int narrow, void *grad_wide, int64_t rows, int64_t I,
                     float *restrict scratch) {
    float *restrict gate = scratch, *restrict up = scratch + I, *restrict given = scratch + 2 * I;
    for (int64_t b = 0; b < rows; b++) {
        load(wide, narrow, b * 2 * I, I, gate);
        load(wide, narrow, b * 2 * I + I, I, up);
        load(grad, narrow_grad, b * I, I, given);
        for (int64_t i = 0; i < I; i++) {
            float g = gate[i], e = exponential(g < 0 ? g : -g), s = (g < 0 ? e : 1.0f) / (1.0f + e);
            gate[i] = given[i] * up[i] * s * (1.0f + g * (1.0f - s));
            up[i] = given[i] * g * s;
        }
        store(grad_wide, narrow, b * 2 * I, I, gate);
        store(grad_wide, narrow, b * 2 * I + I, I, up);
    }
}

/* ---------------------------------------------------------------------------------------------------------------- heads */

/* Halves of a head rotated against each other; sign -1 is the transpose, the rotation back for gradients. */
static inline void rotated(const float *x, const float *cosine, const float *sine, float sign, int64_t d, float *restrict out) {
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * cosine[i] - sign * x[i + half] * sine[sign > 0 ? i : i + half];
        out[i + half] = x[i + half] * cosine[i + half] + sign * x[i] * sine[sign > 0 ? i + half : i];
    }
}

/* mixed [rows, turn + keep, d] -> its first heads rotated [rows, turn, d], and the others [rows, keep, d]; cos, sin [rows, d]. */
void heads_forward(const void *mixed, int narrow, const float *cosine, const float *sine, float *turned, float *kept, int64_t rows,
                   int64_t turn, int64_t keep, int64_t d) {
    float head[DEEPEST];
    for (int64_t b = 0; b < rows; b++) {
        int64_t row = b * (turn + keep) * d;
        for (int64_t h = 0; h < turn; h++) {
            load(mixed, narrow, row + h * d, d, head);
            rotated(head, cosine + b * d, sine + b * d, 1.0f, d, turned + (b * turn + h) * d);
        }
        load(mixed, narrow, row + turn * d, keep * d, kept + b * keep * d);
    }
}

/* The gradient of mixed from those of queries [rows, H, d], keys and values [rows, kv, d]. */
void heads_backward(const float *grad_q, const float *grad_k, const float *grad_v, const float *cosine, const float *sine, void *out,
                    int narrow, int64_t rows, int64_t H, int64_t kv, int64_t d) {
    float head[DEEPEST];
    for (int64_t b = 0; b < rows; b++) {
        int64_t row = b * (H + 2 * kv) * d;
        for (int64_t h = 0; h < H + kv; h++) {
            const float *given = h < H ? grad_q + (b * H + h) * d : grad_k + (b * kv + h - H) * d;
            rotated(given, cosine + b * d, sine + b * d, -1.0f, d, head);
            store(out, narrow, row + h * d, d, head);
        }
        store(out, narrow, row + (H + kv) * d, kv * d, grad_v + b * kv * d);
    }
}

/* ------------------------------------------------------------------------------------------------------------ attention */

/* out[r][0 .. 32) = sum over i of x[r, i] * vectors[i][0 .. 32) for QUERIES rows, given the distances between r and between i in x,
 * between vectors, and between rows of out. */
static inline void sums(const float *x, int64_t row, int64_t step, const float *vectors, int64_t apart, int64_t count, float *out,
                        int64_t out_row) {
    v16 one[QUERIES] = {{0}}, two[QUERIES] = {{0}};
    for (int64_t i = 0; i < count; i++) {
        v16 a = *(const v16 *)(vectors + i * apart), b = *(const v16 *)(vectors + i * apart + 16);
#pragma GCC unroll 8
        for (int r = 0; r < QUERIES; r++) {
            one[r] += x[r * row + i * step] * a;
            two[r] += x[r * row + i * step] * b;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < QUERIES; r++) {
        *(v16 *)(out + r * out_row) = one[r];
        *(v16 *)(out + r * out_row + 16) = two[r];
    }
}

/* out[r][j] = q[r] . key j for QUERIES rows and columns [from, to), both multiples of COLUMNS.
 * q: [d][QUERIES]; keys: blocks of COLUMNS, [S / COLUMNS][d][COLUMNS]; out: [QUERIES][S]. */
static inline void products(const float *q, const float *keys, int64_t d, int64_t from, int64_t to, int64_t S, float *out) {
    for (int64_t j = from; j < to; j += COLUMNS) sums(q, 1, QUERIES, keys + j * d, COLUMNS, d, out + j, S);
}

/* out[r] = sum over j in [from, to) of p[r][j] * rows[j].  p: [QUERIES][S]; rows: [S][d]; out: [QUERIES][d]. */
static inline void mixture(const float *p, const float *rows, int64_t d, int64_t from, int64_t to, int64_t S, float *out) {
    int64_t c = 0;
    for (; c + 32 <= d; c += 32) sums(p + from, S, 1, rows + from * d + c, d, to - from, out + c, d);
    for (; c < d; c += 16)
        for (int r = 0; r < QUERIES; r++) {
            v16 sum = {0};
            for (int64_t j = from; j < to; j++) sum += p[r * S + j] * *(const v16 *)(rows + j * d + c);
            *(v16 *)(out + r * d + c) = sum;
        }
}

/* rows[j] += sum over r of p[r][j] * x[r] for j in [from, to), multiples of 4.  x: [QUERIES][d]. */
static inline void spread(const float *p, const float *x, int64_t d, int64_t from, int64_t to, int64_t S, float *rows) {
    for (int64_t j = from; j < to; j += 4) {
        float *out = rows + j * d;
        int64_t c = 0;
        for (; c + 32 <= d; c += 32) {
            v16 one[4], two[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                one[k] = *(v16 *)(out + k * d + c);
                two[k] = *(v16 *)(out + k * d + c + 16);
            }
#pragma GCC unroll 8
            for (int r = 0; r < QUERIES; r++) {
                v16 a = *(const v16 *)(x + r * d + c), b = *(const v16 *)(x + r * d + c + 16);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    one[k] += p[r * S + j + k] * a;
                    two[k] += p[r * S + j + k] * b;
                }
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                *(v16 *)(out + k * d + c) = one[k];
                *(v16 *)(out + k * d + c + 16) = two[k];
            }
        }
        for (; c < d; c += 16)
            for (int k = 0; k < 4; k++) {
                v16 sum = *(v16 *)(out + k * d + c);
                for (int r = 0; r < QUERIES; r++) sum += p[r * S + j + k] * *(const v16 *)(x + r * d + c);
                *(v16 *)(out + k * d + c) = sum;
            }
    }
}

/* A head's rows [S][d] as blocks of columns, [S / COLUMNS][d][COLUMNS]. */
static inline void in_columns(const float *rows, int64_t d, int64_t S, float *out) {
    for (int64_t j = 0; j < S; j += COLUMNS)
        for (int64_t i = 0; i < d; i++)
            for (int64_t k = 0; k < COLUMNS; k++) out[j * d + i * COLUMNS + k] = rows[(j + k) * d + i];
}

typedef struct { /* a segment: its own tokens, and those it stands behind */
    int64_t first, t, front, before, S;
} Segment;

static inline Segment segment_at(const int64_t *of, int64_t number) {
    const int64_t *x = of + 4 * number;
    int64_t whole = x[1] + x[3];
    return (Segment){x[0], x[1], x[2], x[3], (whole + COLUMNS - 1) / COLUMNS * COLUMNS};
}

/* The place in the pack of key j of a segment. */
static inline int64_t place(const Segment *s, int64_t j) { return j < s->before ? s->front + j : s->first + j - s->before; }

/* One head's keys or values of a segment, [S][d]; what is beyond the last is 0. */
static void gathered(const float *x, int64_t stride, int64_t d, const Segment *s, float *out) {
    int64_t count = s->before + s->t;
    for (int64_t j = 0; j < count; j++) memcpy(out + j * d, x + place(s, j) * stride, d * sizeof(float));
    memset(out + count * d, 0, (s->S - count) * d * sizeof(float));
}

/* Eight rows of a tensor from a row on, times a factor, as rows and as columns; zeros beyond the last. */
static inline void eight(const void *x, int narrow, int64_t stride, int64_t at, int64_t count, int64_t d, float factor, float *rows,
                         float *columns) {
    for (int r = 0; r < QUERIES; r++) {
        if (r < count) load(x, narrow, at + r * stride, d, rows + r * d);
        for (int64_t i = 0; i < d; i++) columns[i * QUERIES + r] = rows[r * d + i] = r < count ? rows[r * d + i] * factor : 0.0f;
    }
}

/* scores -> exp(score - most) within [low, high], 0 elsewhere in [from, to); most and the sum of a row. */
static inline float row_softmax(float *scores, int64_t low, int64_t high, int64_t from, int64_t to, float *most) {
    float top = scores[low];
    for (int64_t j = from; j < low; j++) scores[j] = -INFINITY;
    for (int64_t j = high + 1; j < to; j++) scores[j] = -INFINITY;
    float tops[16];
    for (int l = 0; l < 16; l++) tops[l] = top;
    for (int64_t j = from; j < to; j += 16)
        for (int l = 0; l < 16; l++) tops[l] = scores[j + l] > tops[l] ? scores[j + l] : tops[l];
    for (int l = 0; l < 16; l++) top = tops[l] > top ? tops[l] : top;
    for (int64_t j = from; j < to; j++) scores[j] = exponential(scores[j] - top);
    for (int64_t j = from; j < low; j++) scores[j] = 0.0f;
    for (int64_t j = high + 1; j < to; j++) scores[j] = 0.0f;
    v16 sum = {0};
    for (int64_t j = from; j < to; j += 16) sum += *(v16 *)(scores + j);
    *most = top;
    return total(sum);
}

/* What query i of a segment may look at: [low, high] among its keys. */
static inline void sight(const Segment *s, int64_t i, int64_t window, int64_t *low, int64_t *high) {
    *high = s->before + i;
    *low = window > 0 && *high >= window ? *high - window + 1 : 0;
}

/* q [n, H, d], k and v [n, kv, d] with strides between tokens; segments [count][4]: first token, tokens, first token in front,
 * tokens in front.  out [n, H * d]; logsums [n, H], the logarithm of each softmax's denominator. */
void attention_forward(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                       const int64_t *segments, int64_t count, int64_t kv, int64_t share, int64_t d, float scale, int64_t window,
                       void *out, int narrow_out, float *logsums, float *restrict scratch) {
    int64_t H = kv * share;
    float rows[QUERIES * DEEPEST], columns[QUERIES * DEEPEST];
    for (int64_t number = 0; number < count; number++) {
        Segment s = segment_at(segments, number);
        float *values = scratch, *keys = values + s.S * d, *p = keys + s.S * d;
        for (int64_t g = 0; g < kv; g++) {
            gathered(k + g * d, k_stride, d, &s, values);
            in_columns(values, d, s.S, keys);
            gathered(v + g * d, v_stride, d, &s, values);
            for (int64_t h = g * share; h < (g + 1) * share; h++)
                for (int64_t i = 0; i < s.t; i += QUERIES) {
                    int64_t here = s.t - i < QUERIES ? s.t - i : QUERIES, low, high;
                    sight(&s, i, window, &low, &high);
                    int64_t from = low / COLUMNS * COLUMNS;
                    int64_t to = (s.before + i + here + COLUMNS - 1) / COLUMNS * COLUMNS;
                    eight(q, 0, q_stride, (s.first + i) * q_stride + h * d, here, d, scale, rows, columns);
                    products(columns, keys, d, from, to, s.S, p);
                    float inverse[QUERIES];
                    for (int64_t r = 0; r < QUERIES; r++) {
                        float most;
                        sight(&s, i + (r < here ? r : here - 1), window, &low, &high);
                        float sum = row_softmax(p + r * s.S, low, high, from, to, &most);
                        inverse[r] = 1.0f / sum;
                        if (r < here) logsums[(s.first + i + r) * H + h] = most + logf(sum);
                    }
                    mixture(p, values, d, from, s.before + i + here, s.S, rows);
                    for (int64_t r = 0; r < here; r++) {
                        for (int64_t c = 0; c < d; c++) rows[r * d + c] *= inverse[r];
                        store(out, narrow_out, ((s.first + i + r) * H + h) * d, d, rows + r * d);
                    }
                }
        }
    }
}

/* The gradients of q [n, H, d], k and v [n, kv, d], all contiguous; those of k and v are added to. */
void attention_backward(const void *grad, int narrow, const float *q, int64_t q_stride, const float *k, int64_t k_stride,
                        const float *v, int64_t v_stride, const float *logsums, const int64_t *segments, int64_t count, int64_t kv,
                        int64_t share, int64_t d, float scale, int64_t window, float *grad_q, float *grad_k, float *grad_v,
                        float *restrict scratch) {
    int64_t H = kv * share;
    float rows[QUERIES * DEEPEST], columns[QUERIES * DEEPEST], given[QUERIES * DEEPEST], upright[QUERIES * DEEPEST];
    for (int64_t number = 0; number < count; number++) {
        Segment s = segment_at(segments, number);
        int64_t size = s.S * d;
        float *k_rows = scratch, *k_columns = k_rows + size, *v_columns = k_columns + size;
        float *to_k = v_columns + size, *to_v = to_k + size, *p = to_v + size, *slope = p + QUERIES * s.S;
        for (int64_t g = 0; g < kv; g++) {
            gathered(v + g * d, v_stride, d, &s, k_rows);
            in_columns(k_rows, d, s.S, v_columns);
            gathered(k + g * d, k_stride, d, &s, k_rows);
            in_columns(k_rows, d, s.S, k_columns);
            memset(to_k, 0, 2 * size * sizeof(float));
            for (int64_t h = g * share; h < (g + 1) * share; h++)
                for (int64_t i = 0; i < s.t; i += QUERIES) {
                    int64_t here = s.t - i < QUERIES ? s.t - i : QUERIES, low, high;
                    sight(&s, i, window, &low, &high);
                    int64_t from = low / COLUMNS * COLUMNS;
                    int64_t to = (s.before + i + here + COLUMNS - 1) / COLUMNS * COLUMNS;
                    eight(q, 0, q_stride, (s.first + i) * q_stride + h * d, here, d, scale, rows, columns);
                    products(columns, k_columns, d, from, to, s.S, p);
                    eight(grad, narrow, H * d, ((s.first + i) * H + h) * d, here, d, 1.0f, given, upright);
                    products(upright, v_columns, d, from, to, s.S, slope);
                    for (int64_t r = 0; r < QUERIES; r++) {
                        float *own = p + r * s.S, *change = slope + r * s.S;
                        if (r >= here) {
                            memset(own + from, 0, (to - from) * sizeof(float));
                            memset(change + from, 0, (to - from) * sizeof(float));
                            continue;
                        }
                        float most = logsums[(s.first + i + r) * H + h];
                        sight(&s, i + r, window, &low, &high);
                        for (int64_t j = from; j < to; j++) {
                            float below = own[j] - most; /* above 0 by rounding, or where it may not look */
                            own[j] = exponential(below > 0.0f ? 0.0f : below);
                        }
                        for (int64_t j = from; j < low; j++) own[j] = 0.0f;
                        for (int64_t j = high + 1; j < to; j++) own[j] = 0.0f;
                        v16 sum = {0};
                        for (int64_t j = from; j < to; j += 16) sum += *(v16 *)(own + j) * *(v16 *)(change + j);
                        float mean = total(sum);
                        for (int64_t j = from; j < to; j++) change[j] = own[j] * (change[j] - mean);
                    }
                    spread(p, given, d, from, to, s.S, to_v);
                    spread(slope, rows, d, from, to, s.S, to_k);
                    mixture(slope, k_rows, d, from, to, s.S, upright);
                    for (int64_t r = 0; r < here; r++) {
                        float *out = grad_q + ((s.first + i + r) * H + h) * d;
                        for (int64_t c = 0; c < d; c++) out[c] = upright[r * d + c] * scale;
                    }
                }
            for (int64_t j = 0; j < s.before + s.t; j++) {
                int64_t at = (place(&s, j) * kv + g) * d;
                for (int64_t c = 0; c < d; c++) grad_k[at + c] += to_k[j * d + c];
                for (int64_t c = 0; c < d; c++) grad_v[at + c] += to_v[j * d + c];
            }
        }
    }
}
