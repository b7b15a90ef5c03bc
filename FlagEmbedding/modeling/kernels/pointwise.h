// What stands between an encoder's matrix products: GELU, and dropout with residual and LayerNorm, forward and backward.
// Each is one pass over its rows; arithmetic in float32 whatever the tensors hold.
//
// Shape legend: T rows (tokens) of D elements, D a multiple of 16.
#pragma once

#include <cmath>

#include "vectors.h"

namespace kernels {

// Half of erfc(|x| / sqrt 2), which is Phi(-|x|), to 1e-7 (Abramowitz and Stegun 7.1.26), and e^(-x^2 / 2).
inline vec lower_tail(vec x, vec& bell) {
    const vec z = absolute(x) * all(0.70710678118654752f);
    const vec t = reciprocal(fma(z, all(0.3275911f), all(1.0f)));
    vec y = all(0.5f * 1.061405429f);
    y = fma(y, t, all(0.5f * -1.453152027f));
    y = fma(y, t, all(0.5f * 1.421413741f));
    y = fma(y, t, all(0.5f * -0.284496736f));
    y = fma(y, t, all(0.5f * 0.254829592f));
    bell = exp(fnma(z, z, vec{}));
    return y * t * bell;
}

// Phi(x), the normal distribution function.
inline vec distribution(vec x, vec& bell) {
    const vec tail = lower_tail(x, bell);
    return choose(negative(x), tail, all(1.0f) - tail);
}

// y = x Phi(x).
template <typename T>
void gelu_forward(const T* x, T* y, long count) {
    vec bell;
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        const vec v = load(x + i);
        store(y + i, v * distribution(v, bell));
    }
    if (whole < count) {
        const vec v = load(x + whole, count - whole);
        store(y + whole, v * distribution(v, bell), count - whole);
    }
}

// Phi(x) + x phi(x), GELU's derivative.
inline vec slope(vec x) {
    vec bell;
    const vec below = distribution(x, bell);
    return fma(x * all(0.39894228040143268f), bell, below);
}

// d_x = d_y slope(x).
template <typename T>
void gelu_backward(const T* x, const T* d_y, T* d_x, long count) {
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) store(d_x + i, load(d_y + i) * slope(load(x + i)));
    const long rest = count - whole;
    if (rest) store(d_x + whole, load(d_y + whole, rest) * slope(load(x + whole, rest)), rest);
}

// Row t of a dropout: its mask is that of stream t.
template <typename Function>
inline void with_masks(const Keep& keep, uint32_t threshold, long width, Function&& at) {
    Masks kept(threshold ? &keep : nullptr);
    for (long j = 0; j < width; j += LANES) at(j, kept.at(j));
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
        const vec by = all(scale);
        for (long t = first; t < last; t++) {
            vec total = vec{};
            const Y* from = y + t * width;
            const R* beside = residual + t * width;
            with_masks(Keep(seed, static_cast<uint64_t>(t), threshold), threshold, width, [&](long j, mask kept) {
                const vec v = only(kept, load(from + j) * by) + load(beside + j);
                store(row + j, v);
                if (sums) store(sums + t * width + j, v);
                total += v;
            });
            const float mean = sum_of_lanes(total) / static_cast<float>(width);
            const vec center = all(mean);
            vec squares = vec{};
            for (long j = 0; j < width; j += LANES) {
                const vec v = load(row + j) - center;
                squares = fma(v, v, squares);
            }
            const float inverse = 1.0f / std::sqrt(sum_of_lanes(squares) / static_cast<float>(width) + epsilon);
            const vec factor = all(inverse);
            for (long j = 0; j < width; j += LANES) {
                const vec v = (load(row + j) - center) * factor;
                store(out + t * width + j, fma(v, load(weight + j), load(bias + j)));
            }
            if (means) means[t] = mean, inverses[t] = inverse;
        }
    }

    // d_weight and d_bias [D] are added to; d_residual may be null (then it is d_y, nothing being dropped).
    void backward(const R* d_out, Y* d_y, R* d_residual, float* d_weight, float* d_bias, long first, long last) const {
        const vec by = all(scale);
        for (long t = first; t < last; t++) {
            const vec center = all(means[t]), factor = all(inverses[t]);
            const R *gradient = d_out + t * width, *sum = sums + t * width;
            vec plain = vec{}, along = vec{};
            for (long j = 0; j < width; j += LANES) {
                const vec g = load(gradient + j);
                const vec normed = (load(sum + j) - center) * factor;
                store(d_weight + j, fma(g, normed, load(d_weight + j)));
                store(d_bias + j, g + load(d_bias + j));
                const vec weighted = g * load(weight + j);
                plain += weighted;
                along = fma(weighted, normed, along);
            }
            const vec mean = all(sum_of_lanes(plain) / static_cast<float>(width));
            const vec slope = all(sum_of_lanes(along) / static_cast<float>(width));
            with_masks(Keep(seed, static_cast<uint64_t>(t), threshold), threshold, width, [&](long j, mask kept) {
                const vec normed = (load(sum + j) - center) * factor;
                const vec v = fnma(normed, slope, fma(load(gradient + j), load(weight + j), -mean)) * factor;
                if (d_residual) store(d_residual + t * width + j, v);
                store(d_y + t * width + j, only(kept, v * by));
            });
        }
    }
};

}  // namespace kernels
