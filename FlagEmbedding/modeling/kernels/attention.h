// Softmax attention of rows of tokens with themselves, forward and backward, float32 arithmetic.
//
// A row's keys and values of one head are laid out once, then queries go through a block at a time: scores, softmax and
// the product with the values stay in the second cache. The backward keeps no probabilities: it computes them again
// from the logarithm of the softmax's sum, and draws the dropout's mask again.
//
// Every product is one loop (`multiply`): rows of the left side broadcast, sixteen columns of the right side a vector.
//
// Shape legend: L tokens of a row (P: L rounded up to 16), Q queries in a block, d width of a head.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace kernels {

// A loop of its own for the compiler: inlined, loops crowd each other out of the registers and run at half the speed.
#define OWN_LOOP __attribute__((noinline))

constexpr int BLOCK = 24;  // queries at a time, a multiple of both tile heights

// One tile of C [m, 16 * NV] (+)= A [m, k] B [k, 16 * NV]; A[i][j] lies at a[i * a_row + j * a_col]. m <= MR.
template <int MR, int NV, bool ADD>
OWN_LOOP void tile(const float* a, long a_row, long a_col, const float* b, long b_row, float* c, long c_row, int m, int k) {
    __m512 sum[MR][NV];
    const float* rows[MR];
    for (int i = 0; i < MR; i++) {
        rows[i] = a + std::min(i, m - 1) * a_row;
        for (int j = 0; j < NV; j++) sum[i][j] = _mm512_setzero_ps();
    }
    for (long step = 0; step < k; step++) {
        __m512 right[NV];
        for (int j = 0; j < NV; j++) right[j] = load(b + step * b_row + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const __m512 left = _mm512_set1_ps(rows[i][step * a_col]);
            for (int j = 0; j < NV; j++) sum[i][j] = _mm512_fmadd_ps(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < MR; i++) {
        if (i >= m) break;
        for (int j = 0; j < NV; j++) {
            float* place = c + i * c_row + j * LANES;
            store(place, ADD ? _mm512_add_ps(load(place), sum[i][j]) : sum[i][j]);
        }
    }
}

// C [m, n] (+)= A [m, k] B [k, n]; n a multiple of 16, rows of B and C dense or padded.
template <bool ADD>
inline void multiply(const float* a, long a_row, long a_col, const float* b, long b_row, float* c, long c_row, int m,
                     int n, int k) {
    for (int column = 0; column < n;) {
        const int vectors = std::min((n - column) / LANES, 4);
        const float* right = b + column;
        float* result = c + column;
        if (vectors >= 3) {
            for (int i = 0; i < m; i += 6) {
                const int rest = std::min(6, m - i);
                if (vectors == 4)
                    tile<6, 4, ADD>(a + i * a_row, a_row, a_col, right, b_row, result + i * c_row, c_row, rest, k);
                else
                    tile<6, 3, ADD>(a + i * a_row, a_row, a_col, right, b_row, result + i * c_row, c_row, rest, k);
            }
        } else {
            for (int i = 0; i < m; i += 12) {
                const int rest = std::min(12, m - i);
                if (vectors == 2)
                    tile<12, 2, ADD>(a + i * a_row, a_row, a_col, right, b_row, result + i * c_row, c_row, rest, k);
                else
                    tile<12, 1, ADD>(a + i * a_row, a_row, a_col, right, b_row, result + i * c_row, c_row, rest, k);
            }
        }
        column += vectors * LANES;
    }
}

// Where one operand's rows of tokens lie, heads side by side.
template <typename T>
struct Rows {
    T* data;
    long stride;  // elements from one token to the next
    T* at(long token, long head, long width) const { return data + token * stride + head * width; }
};

// Ask for the elements of the next head of this token, which lie right behind: rows are wider than a page, and the
// processor does not see them coming.
template <bool WRITE, typename T>
inline void fetch_next_head(const T* place, int d) {
    for (int j = 0; j < d; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(place + d + j, WRITE);
}

// target [count, d] = factor * source rows.
template <typename T>
OWN_LOOP void copy_rows(const T* source, long stride, long count, int d, float factor, float* target) {
    const __m512 by = _mm512_set1_ps(factor);
    for (long i = 0; i < count; i++) {
        fetch_next_head<false>(source + i * stride, d);
        for (int j = 0; j < d; j += LANES) store(target + i * d + j, _mm512_mul_ps(by, load(source + i * stride + j)));
    }
}

inline void transpose_16(__m512 (&v)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int h = 0; h < 2; h++) {
            const __m512d low = _mm512_castps_pd(t[i + h]), high = _mm512_castps_pd(t[i + h + 2]);
            v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), even2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD), odd2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
        t[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
        t[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xDD);
        t[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

// target [d, width] = factor * source [count, d] transposed, zeros from `count` to `width`, a multiple of 16.
template <typename T>
OWN_LOOP void transpose_rows(const T* source, long stride, long count, int d, float factor, float* target, long width) {
    const __m512 by = _mm512_set1_ps(factor);
    for (long i = 0; i < count; i++) fetch_next_head<false>(source + i * stride, d);
    for (long i = 0; i < width; i += LANES)
        for (int j = 0; j < d; j += LANES) {
            __m512 v[16];
            for (int r = 0; r < 16; r++)
                v[r] = i + r < count ? _mm512_mul_ps(by, load(source + (i + r) * stride + j)) : _mm512_setzero_ps();
            transpose_16(v);
            for (int r = 0; r < 16; r++) store(target + (j + r) * width + i, v[r]);
        }
}

// target rows = factor * source [d, width] transposed, the first `count` columns.
template <typename T>
OWN_LOOP void store_transposed(const float* source, long width, long count, int d, float factor, T* target, long stride) {
    const __m512 by = _mm512_set1_ps(factor);
    for (long i = 0; i < count; i += LANES)
        for (int j = 0; j < d; j += LANES) {
            __m512 v[16];
            for (int r = 0; r < 16; r++) v[r] = _mm512_mul_ps(by, load(source + (j + r) * width + i));
            transpose_16(v);
            for (int r = 0; r < 16 && i + r < count; r++) {
                if (j == 0) fetch_next_head<true>(target + (i + r) * stride, d);
                store(target + (i + r) * stride + j, v[r]);
            }
        }
}

// One row of d elements, times factor.
template <typename T>
inline void copy_out(const float* source, int d, float factor, T* target) {
    const __m512 by = _mm512_set1_ps(factor);
    fetch_next_head<true>(target, d);
    for (int j = 0; j < d; j += LANES) store(target + j, _mm512_mul_ps(by, load(source + j)));
}

// Chance, scale and seed of the dropout of probabilities; threshold 0: none.
struct Dropout {
    uint32_t threshold;
    float scale;
    uint64_t seed;

    // The mask of one query of one head, all its keys.
    Keep keep(long query, long heads, long head) const {
        return Keep(seed, static_cast<uint64_t>(query) * static_cast<uint64_t>(heads) + static_cast<uint64_t>(head), threshold);
    }
};

// Scores of one query become e^(score - greatest), dropped ones 0; gives the sum before dropping, and the greatest.
OWN_LOOP inline float softmax_row(float* scores, long length, const Dropout& dropout, const Keep& keep, float& greatest) {
    const long whole = length / LANES * LANES;
    const __mmask16 tail = first_lanes(length - whole);
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (long j = 0; j < whole; j += LANES) most = _mm512_max_ps(most, load(scores + j));
    if (tail) most = _mm512_mask_max_ps(most, tail, most, load(scores + whole));
    greatest = _mm512_reduce_max_ps(most);
    const __m512 less = _mm512_set1_ps(greatest);
    __m512 sum = _mm512_setzero_ps();
    __mmask16 kept[2] = {0xFFFF, 0xFFFF};
    for (long j = 0; j < length; j += LANES) {
        __m512 e = exp(_mm512_sub_ps(load(scores + j), less));
        if (j >= whole) e = _mm512_maskz_mov_ps(tail, e);
        sum = _mm512_add_ps(sum, e);
        if (dropout.threshold) {
            const long vector = j / LANES;
            if (!(vector & 1)) keep.masks(static_cast<uint32_t>(vector >> 1), kept[0], kept[1]);
            e = _mm512_maskz_mov_ps(kept[vector & 1], e);
        }
        store(scores + j, e);
    }
    return _mm512_reduce_add_ps(sum);
}

// What a forward and a backward share.
template <typename T>
struct Problem {
    Rows<const T> query, key, value;
    const int32_t* query_starts;  // [rows + 1], in tokens of `query`
    const int32_t* key_starts;    // [rows + 1], in tokens of `key` and `value`
    long heads;
    int width;  // d
    float scale;
    Dropout dropout;
};

// Rows [first, last). `output`: like the queries; `log_sums` [tokens, heads] or null.
template <typename T>
void attention_forward(const Problem<T>& p, Rows<T> output, float* log_sums, long first, long last) {
    long longest = 0;
    for (long row = first; row < last; row++) longest = std::max<long>(longest, p.key_starts[row + 1] - p.key_starts[row]);
    const int d = p.width;
    const long padded = round_up(longest, LANES);
    Scratch scratch;
    float* keys = scratch.take<float>(d * padded);
    float* values = scratch.take<float>(longest * d);
    float* queries = scratch.take<float>(BLOCK * d);
    float* scores = scratch.take<float>(BLOCK * padded);
    float* mixed = scratch.take<float>(BLOCK * d);
    for (long row = first; row < last; row++) {
        const long begin = p.key_starts[row], length = p.key_starts[row + 1] - begin;
        const long width = round_up(length, LANES);
        for (long head = 0; head < p.heads; head++) {
            transpose_rows(p.key.at(begin, head, d), p.key.stride, length, d, p.scale, keys, width);
            copy_rows(p.value.at(begin, head, d), p.value.stride, length, d, 1.0f, values);
            for (long q = p.query_starts[row]; q < p.query_starts[row + 1]; q += BLOCK) {
                const int count = static_cast<int>(std::min<long>(BLOCK, p.query_starts[row + 1] - q));
                copy_rows(p.query.at(q, head, d), p.query.stride, count, d, 1.0f, queries);
                multiply<false>(queries, d, 1, keys, width, scores, width, count, static_cast<int>(width), d);
                float factors[BLOCK];
                for (int i = 0; i < count; i++) {
                    float greatest;
                    const Keep keep = p.dropout.keep(q + i, p.heads, head);
                    const float sum = softmax_row(scores + i * width, length, p.dropout, keep, greatest);
                    factors[i] = p.dropout.scale / sum;
                    if (log_sums) log_sums[(q + i) * p.heads + head] = greatest + std::log(sum);
                }
                multiply<false>(scores, width, 1, values, d, mixed, d, count, d, static_cast<int>(length));
                for (int i = 0; i < count; i++)
                    copy_out(mixed + i * d, d, factors[i], output.at(q + i, head, d));
            }
        }
    }
}

// Scores [count, width] become probabilities (dropped ones 0, kept ones scaled), and `d_scores`, which holds the
// gradient of the dropped probabilities, becomes that of the scores. `inner`: output times its gradient, summed.
OWN_LOOP inline void softmax_backward_row(float* scores, float* d_scores, long length, float log_sum, float inner,
                                 const Dropout& dropout, const Keep& keep) {
    const long whole = length / LANES * LANES;
    const __mmask16 tail = first_lanes(length - whole);
    const __m512 less = _mm512_set1_ps(log_sum), mean = _mm512_set1_ps(inner), by = _mm512_set1_ps(dropout.scale);
    __mmask16 kept[2] = {0xFFFF, 0xFFFF};
    for (long j = 0; j < length; j += LANES) {
        __m512 probability = exp(_mm512_sub_ps(load(scores + j), less));
        if (j >= whole) probability = _mm512_maskz_mov_ps(tail, probability);
        __m512 gradient = load(d_scores + j);
        __m512 dropped = probability;
        if (dropout.threshold) {
            const long vector = j / LANES;
            if (!(vector & 1)) keep.masks(static_cast<uint32_t>(vector >> 1), kept[0], kept[1]);
            gradient = _mm512_maskz_mul_ps(kept[vector & 1], gradient, by);
            dropped = _mm512_maskz_mul_ps(kept[vector & 1], probability, by);
        }
        store(scores + j, dropped);
        store(d_scores + j, _mm512_mul_ps(probability, _mm512_sub_ps(gradient, mean)));
    }
}

template <typename T, typename U>
inline float inner_product(const T* a, const U* b, int d) {
    __m512 sum = _mm512_setzero_ps();
    fetch_next_head<false>(a, d);
    for (int j = 0; j < d; j += LANES) sum = _mm512_fmadd_ps(load(a + j), load(b + j), sum);
    return _mm512_reduce_add_ps(sum);
}

// Gradients of queries, keys and values of rows [first, last); every element of theirs is written.
template <typename T>
void attention_backward(const Problem<T>& p, Rows<const T> output, Rows<const T> gradient, const float* log_sums,
                        Rows<T> d_query, Rows<T> d_key, Rows<T> d_value, long first, long last) {
    long longest = 0;
    for (long row = first; row < last; row++) longest = std::max<long>(longest, p.key_starts[row + 1] - p.key_starts[row]);
    const int d = p.width;
    const long padded = round_up(longest, LANES);
    Scratch scratch;
    float* keys = scratch.take<float>(longest * d);
    float* keys_t = scratch.take<float>(d * padded);
    float* values_t = scratch.take<float>(d * padded);
    float* d_keys_t = scratch.take<float>(d * padded);
    float* d_values_t = scratch.take<float>(d * padded);
    float* queries = scratch.take<float>(BLOCK * d);
    float* outer = scratch.take<float>(BLOCK * d);
    float* scores = scratch.take<float>(BLOCK * padded);
    float* d_scores = scratch.take<float>(BLOCK * padded);
    float* mixed = scratch.take<float>(BLOCK * d);
    for (long row = first; row < last; row++) {
        const long begin = p.key_starts[row], length = p.key_starts[row + 1] - begin;
        const long width = round_up(length, LANES);
        const int columns = static_cast<int>(width);
        for (long head = 0; head < p.heads; head++) {
            copy_rows(p.key.at(begin, head, d), p.key.stride, length, d, p.scale, keys);
            transpose_rows(p.key.at(begin, head, d), p.key.stride, length, d, p.scale, keys_t, width);
            transpose_rows(p.value.at(begin, head, d), p.value.stride, length, d, 1.0f, values_t, width);
            std::fill(d_keys_t, d_keys_t + d * width, 0.0f);
            std::fill(d_values_t, d_values_t + d * width, 0.0f);
            for (long q = p.query_starts[row]; q < p.query_starts[row + 1]; q += BLOCK) {
                const int count = static_cast<int>(std::min<long>(BLOCK, p.query_starts[row + 1] - q));
                copy_rows(p.query.at(q, head, d), p.query.stride, count, d, 1.0f, queries);
                copy_rows(gradient.at(q, head, d), gradient.stride, count, d, 1.0f, outer);
                multiply<false>(queries, d, 1, keys_t, width, scores, width, count, columns, d);
                multiply<false>(outer, d, 1, values_t, width, d_scores, width, count, columns, d);
                for (int i = 0; i < count; i++) {
                    const float inner = inner_product(output.at(q + i, head, d), outer + i * d, d);
                    softmax_backward_row(scores + i * width, d_scores + i * width, length,
                                         log_sums[(q + i) * p.heads + head], inner, p.dropout,
                                         p.dropout.keep(q + i, p.heads, head));
                }
                multiply<false>(d_scores, width, 1, keys, d, mixed, d, count, d, static_cast<int>(length));
                for (int i = 0; i < count; i++) copy_out(mixed + i * d, d, 1.0f, d_query.at(q + i, head, d));
                multiply<true>(queries, 1, d, d_scores, width, d_keys_t, width, d, columns, count);
                multiply<true>(outer, 1, d, scores, width, d_values_t, width, d, columns, count);
            }
            store_transposed(d_keys_t, width, length, d, p.scale, d_key.at(begin, head, d), d_key.stride);
            store_transposed(d_values_t, width, length, d, 1.0f, d_value.at(begin, head, d), d_value.stride);
        }
    }
}

}  // namespace kernels
