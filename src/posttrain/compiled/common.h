/* What the kernels share: bfloat16 in and out, an exponential, sums of lanes. */
#ifndef POSTTRAIN_COMMON_H
#define POSTTRAIN_COMMON_H

#include <stdint.h>
#include <string.h>
#include <math.h>

typedef uint16_t bf16;
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));
typedef uint32_t u16v __attribute__((vector_size(64), aligned(4)));

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow(float x) { /* to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float rounded(float x, int to_narrow) { /* what the trainer's tensors round, this rounds too */
    return to_narrow ? widen(narrow(x)) : x;
}

static inline void load(const void *from, int is_narrow, int64_t at, int64_t count, float *restrict to) {
    if (is_narrow) {
        const bf16 *x = (const bf16 *)from + at;
        for (int64_t i = 0; i < count; i++) to[i] = widen(x[i]);
    } else {
        memcpy(to, (const float *)from + at, count * sizeof(float));
    }
}

static inline void store(void *to, int is_narrow, int64_t at, int64_t count, const float *restrict from) {
    if (is_narrow) {
        bf16 *x = (bf16 *)to + at;
        for (int64_t i = 0; i < count; i++) x[i] = narrow(from[i]);
    } else {
        memcpy((float *)to + at, from, count * sizeof(float));
    }
}

/* exp of x <= 0, as Cephes has it: one unit in the last place; NaN stays NaN. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return p * scale;
}

static inline float total(v16 x) {
    float out = 0.0f;
    for (int i = 0; i < 16; i++) out += x[i];
    return out;
}

static inline float squares(const float *x, int64_t count) {
    v16 sum = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        v16 part = *(const v16 *)(x + i);
        sum += part * part;
    }
    float out = total(sum);
    for (; i < count; i++) out += x[i] * x[i];
    return out;
}

/* ------------------------------------------------------------------------------------------------------------ attention
 *
 * A decoding step and a training step share every function below, and both add up in the same order: one key after another, one
 * depth after another, sixteen lanes of a softmax.  So the sampler's states are the trainer's, bit for bit.  `R`, how many queries
 * go together, is a constant where these are called, and changes no sum.
 */

enum { QUERIES = 8, COLUMNS = 32, DEEPEST = 256 };

#define INLINE static inline __attribute__((always_inline))

INLINE v16 sixteen(const void *values, int is_narrow, int64_t at) {
    if (!is_narrow) return *(const v16 *)((const float *)values + at);
    u16v bits = __builtin_convertvector(*(const h16 *)((const bf16 *)values + at), u16v) << 16;
    v16 out;
    memcpy(&out, &bits, 64);
    return out;
}

/* out[r][0 .. 32) = sum over i of x[r, i] * vectors[i][0 .. 32) for R rows, given the distances between r and between i in x,
 * between vectors, and between rows of out. */
INLINE void sums(const int R, const float *x, int64_t row, int64_t step, const void *vectors, int is_narrow, int64_t at,
                 int64_t apart, int64_t count, float *out, int64_t out_row) {
    v16 one[QUERIES] = {{0}}, two[QUERIES] = {{0}};
    for (int64_t i = 0; i < count; i++) {
        v16 a = sixteen(vectors, is_narrow, at + i * apart), b = sixteen(vectors, is_narrow, at + i * apart + 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            one[r] += x[r * row + i * step] * a;
            two[r] += x[r * row + i * step] * b;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        *(v16 *)(out + r * out_row) = one[r];
        *(v16 *)(out + r * out_row + 16) = two[r];
    }
}

/* out[r] = sum over j in [from, to) of p[r][j] * vectors[j].  p: [R][S]; vectors, from place `at` on: [S][d]; out: [R][d]. */
INLINE void mixture(const int R, const float *p, const void *vectors, int is_narrow, int64_t at, int64_t d, int64_t from, int64_t to,
                    int64_t S, float *out) {
    int64_t c = 0;
    for (; c + 32 <= d; c += 32)
        sums(R, p + from, S, 1, vectors, is_narrow, at + from * d + c, d, to - from, out + c, d);
    for (; c < d; c += 16)
        for (int r = 0; r < R; r++) {
            v16 sum = {0};
            for (int64_t j = from; j < to; j++) sum += p[r * S + j] * sixteen(vectors, is_narrow, at + j * d + c);
            *(v16 *)(out + r * d + c) = sum;
        }
}

/* scores -> exp(score - most) within [low, high], 0 elsewhere in [from, to), multiples of 16; most, and the sum of the row. */
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

/* Halves of a head rotated against each other; sign -1 is the transpose, the rotation back for gradients. */
INLINE void rotated(const float *x, const float *cosine, const float *sine, float sign, int64_t d, float *restrict out) {
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * cosine[i] - sign * x[i + half] * sine[sign > 0 ? i : i + half];
        out[i + half] = x[i + half] * cosine[i + half] + sign * x[i] * sine[sign > 0 ? i + half : i];
    }
}

#endif
