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

#endif
