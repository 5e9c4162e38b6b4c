/* What stands between the matrix products of a training step, forward and backward, for one CPU thread: plain C, called through
 * ctypes.  The arithmetic is float32; bfloat16 tensors are read and written as such.
 *
 * Axes: rows (tokens) n, D width, I inner width, H = kv * share query heads, d head width (a multiple of 16, at most 256),
 * t queries and S keys of a segment.
 */
#include "common.h"

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

/* out[r][j] = q[r] . key j for R rows and columns [from, to), both multiples of COLUMNS.
 * q: [d][R]; keys: blocks of COLUMNS, [S / COLUMNS][d][COLUMNS]; out: [R][S]. */
INLINE void products(const int R, const float *q, const float *keys, int64_t d, int64_t from, int64_t to, int64_t S, float *out) {
    for (int64_t j = from; j < to; j += COLUMNS) sums(R, q, 1, R, keys, 0, j * d, COLUMNS, d, out + j, S);
}

/* rows[j] += sum over r of p[r][j] * x[r] for j in [from, to), multiples of 4.  x: [R][d]. */
INLINE void spread(const int R, const float *p, const float *x, int64_t d, int64_t from, int64_t to, int64_t S, float *rows) {
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
            for (int r = 0; r < R; r++) {
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
                for (int r = 0; r < R; r++) sum += p[r * S + j + k] * *(const v16 *)(x + r * d + c);
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

/* R rows of a tensor from a row on, times a factor, as rows and as columns; zeros beyond the last of `count`. */
INLINE void taken(const int R, const void *x, int narrow, int64_t stride, int64_t at, int64_t count, int64_t d, float factor,
                  float *rows, float *columns) {
    for (int r = 0; r < R; r++) {
        if (r < count) load(x, narrow, at + r * stride, d, rows + r * d);
        for (int64_t i = 0; i < d; i++) columns[i * R + r] = rows[r * d + i] = r < count ? rows[r * d + i] * factor : 0.0f;
    }
}

/* What query i of a segment may look at: [low, high] among its keys. */
static inline void sight(const Segment *s, int64_t i, int64_t window, int64_t *low, int64_t *high) {
    *high = s->before + i;
    *low = window > 0 && *high >= window ? *high - window + 1 : 0;
}

/* Queries, keys and values with strides between tokens, and one head of each: q [n, H, d], k and v [n, kv, d]. */
typedef struct {
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride, H, d, window, head; /* head: of the queries */
    float scale;
} Heads;

/* Queries i to i + here of a segment, at most R, and the columns that any of them reads: whole blocks from `from` to `to`. */
typedef struct {
    int64_t i, here, from, to;
} Block;

static inline Block block_at(const Segment *s, int64_t i, int64_t window) {
    int64_t here = s->t - i < QUERIES ? s->t - i : QUERIES, low, high;
    sight(s, i, window, &low, &high);
    return (Block){i, here, low / COLUMNS * COLUMNS, (s->before + i + here + COLUMNS - 1) / COLUMNS * COLUMNS};
}

/* Run a function for the queries of a block, by fours where there are no more: their number is a constant inside it. */
#define FOR_BLOCK(block, function, ...) ((block).here > 4 ? function(8, __VA_ARGS__) : function(4, __VA_ARGS__))

/* One block of one head; keys in blocks of columns, values [S][d]. */
INLINE void forward_block(const int R, const Heads *of, const Segment *s, Block block, const float *keys, const float *values,
                          float *p, void *out, int narrow, float *logsums) {
    float rows[QUERIES * DEEPEST], columns[QUERIES * DEEPEST], inverse[QUERIES];
    int64_t d = of->d, token = s->first + block.i;
    taken(R, of->q, 0, of->q_stride, token * of->q_stride + of->head * d, block.here, d, of->scale, rows, columns);
    products(R, columns, keys, d, block.from, block.to, s->S, p);
    for (int64_t r = 0; r < R; r++) {
        int64_t low, high;
        float most;
        sight(s, block.i + (r < block.here ? r : block.here - 1), of->window, &low, &high);
        float sum = row_softmax(p + r * s->S, low, high, block.from, block.to, &most);
        inverse[r] = 1.0f / sum;
        if (r < block.here) logsums[(token + r) * of->H + of->head] = most + logf(sum);
    }
    mixture(R, p, values, 0, 0, d, block.from, s->before + block.i + block.here, s->S, rows);
    for (int64_t r = 0; r < block.here; r++) {
        for (int64_t c = 0; c < d; c++) rows[r * d + c] *= inverse[r];
        store(out, narrow, ((token + r) * of->H + of->head) * d, d, rows + r * d);
    }
}

/* q [n, H, d], k and v [n, kv, d] with strides between tokens; segments [count][4]: first token, tokens, first token in front,
 * tokens in front.  out [n, H * d]; logsums [n, H], the logarithm of each softmax's denominator. */
void attention_forward(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                       const int64_t *segments, int64_t count, int64_t kv, int64_t share, int64_t d, float scale, int64_t window,
                       void *out, int narrow_out, float *logsums, float *restrict scratch) {
    Heads of = {q, k, v, q_stride, k_stride, v_stride, kv * share, d, window, 0, scale};
    for (int64_t number = 0; number < count; number++) {
        Segment s = segment_at(segments, number);
        float *values = scratch, *keys = values + s.S * d, *p = keys + s.S * d;
        for (int64_t g = 0; g < kv; g++) {
            gathered(k + g * d, k_stride, d, &s, values);
            in_columns(values, d, s.S, keys);
            gathered(v + g * d, v_stride, d, &s, values);
            for (of.head = g * share; of.head < (g + 1) * share; of.head++)
                for (int64_t i = 0; i < s.t; i += QUERIES) {
                    Block block = block_at(&s, i, window);
                    FOR_BLOCK(block, forward_block, &of, &s, block, keys, values, p, out, narrow_out, logsums);
                }
        }
    }
}

/* What the backward pass of one key head works with: keys as rows [S][d], keys and values in blocks of columns, the gradients
 * of both [S][d], and two rows of columns a query. */
typedef struct {
    float *k_rows, *k_columns, *v_columns, *to_k, *to_v, *p, *slope;
} Scratch;

/* scores -> probabilities p, and slope -> the gradient of the scores from that of p, of one query; zeros where it may not look. */
static inline void softmax_backward(float *p, float *slope, float logsum, int64_t low, int64_t high, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) {
        float below = p[j] - logsum; /* above 0 by rounding, or where it may not look */
        p[j] = exponential(below > 0.0f ? 0.0f : below);
    }
    for (int64_t j = from; j < low; j++) p[j] = 0.0f;
    for (int64_t j = high + 1; j < to; j++) p[j] = 0.0f;
    v16 sum = {0};
    for (int64_t j = from; j < to; j += 16) sum += *(v16 *)(p + j) * *(v16 *)(slope + j);
    float mean = total(sum);
    for (int64_t j = from; j < to; j++) slope[j] = p[j] * (slope[j] - mean);
}

/* One block of one head: adds to the gradients of keys and values, writes that of the queries. */
INLINE void backward_block(const int R, const Heads *of, const Segment *s, Block block, const Scratch *at, const void *grad, int narrow,
                           const float *logsums, float *grad_q) {
    float rows[QUERIES * DEEPEST], columns[QUERIES * DEEPEST], given[QUERIES * DEEPEST];
    int64_t d = of->d, H = of->H, token = s->first + block.i, from = block.from, to = block.to;
    taken(R, grad, narrow, H * d, (token * H + of->head) * d, block.here, d, 1.0f, given, columns);
    products(R, columns, at->v_columns, d, from, to, s->S, at->slope);
    taken(R, of->q, 0, of->q_stride, token * of->q_stride + of->head * d, block.here, d, of->scale, rows, columns);
    products(R, columns, at->k_columns, d, from, to, s->S, at->p);
    for (int64_t r = 0; r < R; r++) {
        float *p = at->p + r * s->S, *slope = at->slope + r * s->S;
        if (r >= block.here) {
            memset(p + from, 0, (to - from) * sizeof(float));
            memset(slope + from, 0, (to - from) * sizeof(float));
            continue;
        }
        int64_t low, high;
        sight(s, block.i + r, of->window, &low, &high);
        softmax_backward(p, slope, logsums[(token + r) * H + of->head], low, high, from, to);
    }
    spread(R, at->p, given, d, from, to, s->S, at->to_v);
    spread(R, at->slope, rows, d, from, to, s->S, at->to_k);
    mixture(R, at->slope, at->k_rows, 0, 0, d, from, to, s->S, columns);
    for (int64_t r = 0; r < block.here; r++) {
        float *out = grad_q + ((token + r) * H + of->head) * d;
        for (int64_t c = 0; c < d; c++) out[c] = columns[r * d + c] * of->scale;
    }
}

/* The gradients of q [n, H, d], k and v [n, kv, d], all contiguous; those of k and v are added to. */
void attention_backward(const void *grad, int narrow, const float *q, int64_t q_stride, const float *k, int64_t k_stride,
                        const float *v, int64_t v_stride, const float *logsums, const int64_t *segments, int64_t count, int64_t kv,
                        int64_t share, int64_t d, float scale, int64_t window, float *grad_q, float *grad_k, float *grad_v,
                        float *restrict scratch) {
    Heads of = {q, k, v, q_stride, k_stride, v_stride, kv * share, d, window, 0, scale};
    for (int64_t number = 0; number < count; number++) {
        Segment s = segment_at(segments, number);
        int64_t size = s.S * d;
        float *p = scratch + 5 * size;
        Scratch at = {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 4 * size, p, p + QUERIES * s.S};
        for (int64_t g = 0; g < kv; g++) {
            gathered(v + g * d, v_stride, d, &s, at.k_rows);
            in_columns(at.k_rows, d, s.S, at.v_columns);
            gathered(k + g * d, k_stride, d, &s, at.k_rows);
            in_columns(at.k_rows, d, s.S, at.k_columns);
            memset(at.to_k, 0, 2 * size * sizeof(float));
            for (of.head = g * share; of.head < (g + 1) * share; of.head++)
                for (int64_t i = 0; i < s.t; i += QUERIES) {
                    Block block = block_at(&s, i, window);
                    FOR_BLOCK(block, backward_block, &of, &s, block, &at, grad, narrow, logsums, grad_q);
                }
            for (int64_t j = 0; j < s.before + s.t; j++) {
                int64_t to = (place(&s, j) * kv + g) * d;
                for (int64_t c = 0; c < d; c++) grad_k[to + c] += at.to_k[j * d + c];
                for (int64_t c = 0; c < d; c++) grad_v[to + c] += at.to_v[j * d + c];
            }
        }
    }
}
