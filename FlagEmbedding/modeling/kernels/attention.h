// Softmax attention of rows of tokens with themselves, forward and backward, float32 arithmetic.
//
// A row's keys and values of one head are laid out once, then queries go through a block at a time: scores, softmax and
// the product with the values stay in the second cache. The backward keeps no probabilities: it computes them again
// from the logarithm of the softmax's sum, and draws the dropout's mask again.
//
// Every product is one loop (`multiply`): rows of the left side broadcast, columns of the right side in vectors.
//
// Shape legend: L tokens of a row (P: L rounded up to 16), Q queries in a block, d width of a head.
#pragma once

#include <cmath>
#include <limits>

#include "vectors.h"

namespace kernels {

constexpr int BLOCK = 24;  // queries at a time, a multiple of both tile heights
constexpr int PAD = 16;    // keys are padded to a multiple of this, which holds whole vectors of every set

// One tile of C [m, LANES * NV] (+)= A [m, k] B [k, LANES * NV]; A[i][j] lies at a[i * a_row + j * a_col]. m <= MR.
template <int MR, int NV, bool ADD>
OWN_LOOP void tile(const float* a, long a_row, long a_col, const float* b, long b_row, float* c, long c_row, int m, int k) {
    vec sum[MR][NV];
    const float* rows[MR];
    for (int i = 0; i < MR; i++) {
        rows[i] = a + std::min(i, m - 1) * a_row;
        for (int j = 0; j < NV; j++) sum[i][j] = vec{};
    }
    for (long step = 0; step < k; step++) {
        vec right[NV];
        for (int j = 0; j < NV; j++) right[j] = load(b + step * b_row + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const vec left = all(rows[i][step * a_col]);
            for (int j = 0; j < NV; j++) sum[i][j] = fma(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < MR; i++) {
        if (i >= m) break;
        for (int j = 0; j < NV; j++) {
            float* place = c + i * c_row + j * LANES;
            store(place, ADD ? load(place) + sum[i][j] : sum[i][j]);
        }
    }
}

// Columns [column, column + NV vectors) of the product below, MR rows at a time.
template <int MR, int NV, bool ADD>
inline void multiply_panel(const float* a, long a_row, long a_col, const float* b, long b_row, float* c, long c_row, int m, int k) {
    for (int i = 0; i < m; i += MR)
        tile<MR, NV, ADD>(a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, std::min(MR, m - i), k);
}

// C [m, n] (+)= A [m, k] B [k, n]; n a multiple of 16, rows of B and C dense or padded. Tiles fill the registers: 32 of
// AVX-512 and NEON, 16 of AVX2.
template <bool ADD>
inline void multiply(const float* a, long a_row, long a_col, const float* b, long b_row, float* c, long c_row, int m,
                     int n, int k) {
    for (int column = 0; column < n;) {
        const int vectors = LANES < 16 ? 16 / LANES : std::min((n - column) / LANES, 4);
        const float* right = b + column;
        float* result = c + column;
        if constexpr (LANES < 16)
            multiply_panel<6, 16 / LANES, ADD>(a, a_row, a_col, right, b_row, result, c_row, m, k);
        else if (vectors == 4)
            multiply_panel<6, 4, ADD>(a, a_row, a_col, right, b_row, result, c_row, m, k);
        else if (vectors == 3)
            multiply_panel<6, 3, ADD>(a, a_row, a_col, right, b_row, result, c_row, m, k);
        else if (vectors == 2)
            multiply_panel<12, 2, ADD>(a, a_row, a_col, right, b_row, result, c_row, m, k);
        else
            multiply_panel<12, 1, ADD>(a, a_row, a_col, right, b_row, result, c_row, m, k);
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
    const vec by = all(factor);
    for (long i = 0; i < count; i++) {
        fetch_next_head<false>(source + i * stride, d);
        for (int j = 0; j < d; j += LANES) store(target + i * d + j, by * load(source + i * stride + j));
    }
}

// target [d, width] = factor * source [count, d] transposed, zeros from `count` to `width`, a multiple of 16.
template <typename T>
OWN_LOOP void transpose_rows(const T* source, long stride, long count, int d, float factor, float* target, long width) {
    const vec by = all(factor);
    for (long i = 0; i < count; i++) fetch_next_head<false>(source + i * stride, d);
    for (long i = 0; i < width; i += LANES)
        for (int j = 0; j < d; j += LANES) {
            vec v[LANES];
            for (int r = 0; r < LANES; r++)
                v[r] = i + r < count ? by * load(source + (i + r) * stride + j) : vec{};
            transpose(v);
            for (int r = 0; r < LANES; r++) store(target + (j + r) * width + i, v[r]);
        }
}

// target rows = factor * source [d, width] transposed, the first `count` columns.
template <typename T>
OWN_LOOP void store_transposed(const float* source, long width, long count, int d, float factor, T* target, long stride) {
    const vec by = all(factor);
    for (long i = 0; i < count; i += LANES)
        for (int j = 0; j < d; j += LANES) {
            vec v[LANES];
            for (int r = 0; r < LANES; r++) v[r] = by * load(source + (j + r) * width + i);
            transpose(v);
            for (int r = 0; r < LANES && i + r < count; r++) {
                if (j == 0) fetch_next_head<true>(target + (i + r) * stride, d);
                store(target + (i + r) * stride + j, v[r]);
            }
        }
}

// One row of d elements, times factor.
template <typename T>
inline void copy_out(const float* source, int d, float factor, T* target) {
    const vec by = all(factor);
    fetch_next_head<true>(target, d);
    for (int j = 0; j < d; j += LANES) store(target + j, by * load(source + j));
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
    const mask tail = first_lanes(length - whole);
    vec most = all(-std::numeric_limits<float>::infinity());
    for (long j = 0; j < whole; j += LANES) most = max(most, load(scores + j));
    if (whole < length) most = max(most, choose(tail, load(scores + whole), most));
    greatest = greatest_lane(most);
    const vec less = all(greatest);
    vec sum = vec{};
    Masks kept(dropout.threshold ? &keep : nullptr);
    for (long j = 0; j < length; j += LANES) {
        vec e = exp(load(scores + j) - less);
        if (j >= whole) e = only(tail, e);
        sum += e;
        store(scores + j, dropout.threshold ? only(kept.at(j), e) : e);
    }
    return sum_of_lanes(sum);
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
    const long padded = round_up(longest, PAD);
    Scratch scratch;
    float* keys = scratch.take<float>(d * padded);
    float* values = scratch.take<float>(longest * d);
    float* queries = scratch.take<float>(BLOCK * d);
    float* scores = scratch.take<float>(BLOCK * padded);
    float* mixed = scratch.take<float>(BLOCK * d);
    for (long row = first; row < last; row++) {
        const long begin = p.key_starts[row], length = p.key_starts[row + 1] - begin;
        const long width = round_up(length, PAD);
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
    const mask tail = first_lanes(length - whole);
    const vec less = all(log_sum), mean = all(inner), by = all(dropout.scale);
    Masks kept(dropout.threshold ? &keep : nullptr);
    for (long j = 0; j < length; j += LANES) {
        vec probability = exp(load(scores + j) - less);
        if (j >= whole) probability = only(tail, probability);
        vec gradient = load(d_scores + j);
        vec dropped = probability;
        if (dropout.threshold) {
            const mask stays = kept.at(j);
            gradient = only(stays, gradient * by);
            dropped = only(stays, probability * by);
        }
        store(scores + j, dropped);
        store(d_scores + j, probability * (gradient - mean));
    }
}

template <typename T, typename U>
inline float inner_product(const T* a, const U* b, int d) {
    vec sum = vec{};
    fetch_next_head<false>(a, d);
    for (int j = 0; j < d; j += LANES) sum = fma(load(a + j), load(b + j), sum);
    return sum_of_lanes(sum);
}

// Gradients of queries, keys and values of rows [first, last); every element of theirs is written.
template <typename T>
void attention_backward(const Problem<T>& p, Rows<const T> output, Rows<const T> gradient, const float* log_sums,
                        Rows<T> d_query, Rows<T> d_key, Rows<T> d_value, long first, long last) {
    long longest = 0;
    for (long row = first; row < last; row++) longest = std::max<long>(longest, p.key_starts[row + 1] - p.key_starts[row]);
    const int d = p.width;
    const long padded = round_up(longest, PAD);
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
        const long width = round_up(length, PAD);
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
