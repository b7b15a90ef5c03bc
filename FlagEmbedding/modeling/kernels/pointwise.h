// What stands between an encoder's matrix products: GELU, and dropout with residual and LayerNorm, forward and backward.
// Each is one pass over its rows; arithmetic in float32 whatever the tensors hold.
//
// Shape legend: T rows (tokens) of D elements, D a multiple of 16.
#pragma once

#include <cmath>

#include "vectors.h"

namespace kernels {

// Half of erfc(|x| / sqrt 2), which is Phi(-|x|), to 1e-7 (Abramowitz and Stegun 7.1.26), and e^(-x^2 / 2).
inline __m512 lower_tail(__m512 x, __m512& bell) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678118654752f));
    const __m512 denominator = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f));
    // A reciprocal of 14 bits and one Newton step: 28 bits, in a fraction of a division's time.
    __m512 t = _mm512_rcp14_ps(denominator);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(denominator, t, _mm512_set1_ps(2.0f)));
    __m512 y = _mm512_set1_ps(0.5f * 1.061405429f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.5f * -1.453152027f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.5f * 1.421413741f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.5f * -0.284496736f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.5f * 0.254829592f));
    bell = exp(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps()));
    return _mm512_mul_ps(_mm512_mul_ps(y, t), bell);
}

// Phi(x), the normal distribution function.
inline __m512 distribution(__m512 x, __m512& bell) {
    const __m512 tail = lower_tail(x, bell);
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1.0f), tail), negative, tail);
}

// y = x Phi(x).
template <typename T>
void gelu_forward(const T* x, T* y, long count) {
    __m512 bell;
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        const __m512 v = load(x + i);
        store(y + i, _mm512_mul_ps(v, distribution(v, bell)));
    }
    if (whole < count) {
        const __mmask16 lanes = first_lanes(count - whole);
        const __m512 v = load(x + whole, lanes);
        store(y + whole, _mm512_mul_ps(v, distribution(v, bell)), lanes);
    }
}

// Phi(x) + x phi(x), GELU's derivative.
inline __m512 slope(__m512 x) {
    __m512 bell;
    const __m512 below = distribution(x, bell);
    return _mm512_fmadd_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.39894228040143268f)), bell, below);
}

// d_x = d_y slope(x).
template <typename T>
void gelu_backward(const T* x, const T* d_y, T* d_x, long count) {
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) store(d_x + i, _mm512_mul_ps(load(d_y + i), slope(load(x + i))));
    if (whole < count) {
        const __mmask16 lanes = first_lanes(count - whole);
        store(d_x + whole, _mm512_mul_ps(load(d_y + whole, lanes), slope(load(x + whole, lanes))), lanes);
    }
}

// Row t of a dropout: its mask is that of stream t.
template <typename Function>
inline void with_masks(const Keep& keep, uint32_t threshold, long width, Function&& at) {
    __mmask16 kept[2] = {0xFFFF, 0xFFFF};
    for (long j = 0; j < width; j += LANES) {
        const long vector = j / LANES;
        if (threshold && !(vector & 1)) keep.masks(static_cast<uint32_t>(vector >> 1), kept[0], kept[1]);
        at(j, kept[vector & 1]);
    }
}

// out = LayerNorm(dropout(y) + residual). Y: what a product gave; R: the residual, the norm's parameters, the result.
template <typename Y, typename R>
struct AddNorm {
    const Y* y;
    const R* residual;
    const R *weight, *bias;
    R* sums;   // [T, D] dropout(y) + residual, or null where no backward follows
    R* out;
    float *means, *inverses;  // [T] mean and 1 / standard deviation, or null
    long width;
    float epsilon;
    uint32_t threshold;
    float scale;
    uint64_t seed;

    void forward(long first, long last) const {
        Scratch scratch;
        float* row = scratch.take<float>(width);
        const __m512 by = _mm512_set1_ps(scale);
        for (long t = first; t < last; t++) {
            __m512 total = _mm512_setzero_ps();
            const Y* from = y + t * width;
            const R* beside = residual + t * width;
            with_masks(Keep(seed, static_cast<uint64_t>(t), threshold), threshold, width, [&](long j, __mmask16 kept) {
                const __m512 v = _mm512_add_ps(_mm512_maskz_mul_ps(kept, load(from + j), by), load(beside + j));
                store(row + j, v);
                if (sums) store(sums + t * width + j, v);
                total = _mm512_add_ps(total, v);
            });
            const float mean = _mm512_reduce_add_ps(total) / static_cast<float>(width);
            const __m512 center = _mm512_set1_ps(mean);
            __m512 squares = _mm512_setzero_ps();
            for (long j = 0; j < width; j += LANES) {
                const __m512 v = _mm512_sub_ps(load(row + j), center);
                squares = _mm512_fmadd_ps(v, v, squares);
            }
            const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(width) + epsilon);
            const __m512 factor = _mm512_set1_ps(inverse);
            for (long j = 0; j < width; j += LANES) {
                const __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(row + j), center), factor);
                store(out + t * width + j, _mm512_fmadd_ps(v, load(weight + j), load(bias + j)));
            }
            if (means) means[t] = mean, inverses[t] = inverse;
        }
    }

    // d_weight and d_bias [D] are added to; d_residual may be null (then it is d_y, nothing being dropped).
    void backward(const R* d_out, Y* d_y, R* d_residual, float* d_weight, float* d_bias, long first, long last) const {
        const __m512 by = _mm512_set1_ps(scale);
        for (long t = first; t < last; t++) {
            const __m512 center = _mm512_set1_ps(means[t]), factor = _mm512_set1_ps(inverses[t]);
            const R *gradient = d_out + t * width, *sum = sums + t * width;
            __m512 plain = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            for (long j = 0; j < width; j += LANES) {
                const __m512 g = load(gradient + j);
                const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(sum + j), center), factor);
                store(d_weight + j, _mm512_fmadd_ps(g, normed, load(d_weight + j)));
                store(d_bias + j, _mm512_add_ps(g, load(d_bias + j)));
                const __m512 weighted = _mm512_mul_ps(g, load(weight + j));
                plain = _mm512_add_ps(plain, weighted);
                along = _mm512_fmadd_ps(weighted, normed, along);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(plain) / static_cast<float>(width));
            const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(along) / static_cast<float>(width));
            with_masks(Keep(seed, static_cast<uint64_t>(t), threshold), threshold, width, [&](long j, __mmask16 kept) {
                const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(sum + j), center), factor);
                __m512 v = _mm512_fmsub_ps(load(gradient + j), load(weight + j), mean);
                v = _mm512_mul_ps(_mm512_fnmadd_ps(normed, slope, v), factor);
                if (d_residual) store(d_residual + t * width + j, v);
                store(d_y + t * width + j, _mm512_maskz_mul_ps(kept, v, by));
            });
        }
    }
};

}  // namespace kernels
