// attention.h in bfloat16 with AMX: tiles of 16 rows by 32 elements times 32 elements by 16 columns.
//
// Keys and values of a row and head are laid out once as tiles whose rows hold pairs, as the instruction reads them;
// queries are read where they lie. Scores and softmax are float32, probabilities are rounded to bfloat16 for the product
// with the values (in the backward: so are the scores' gradients for the products they enter), and sums are float32.
//
// Shape legend: L tokens of a row (W: L rounded up to 32), 32 queries at a time, d width of a head, a multiple of 32.
#pragma once

#ifdef __AMX_TILE__

#include "attention.h"

namespace kernels {

constexpr int TILE = 16 * 32;  // elements of a tile
constexpr int QUERIES = 32;    // queries at a time: two tiles

// All eight tiles as 16 rows of 64 bytes. Who used tiles before finds the old configuration again: oneDNN remembers what
// it has set in a thread and does not set it twice.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(before_);
        alignas(64) uint8_t mine[64] = {};
        mine[0] = 1;
        for (int tile = 0; tile < 8; tile++) {
            mine[16 + 2 * tile] = 64;
            mine[48 + tile] = 16;
        }
        _tile_loadconfig(mine);
    }
    ~Tiles() {
        if (before_[0])
            _tile_loadconfig(before_);
        else
            _tile_release();
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    alignas(64) uint8_t before_[64];
};

// Tiles [W / 16][d / 32] of keys: row p of a tile holds elements 2p and 2p + 1 of 16 keys.
OWN_LOOP inline void tile_keys(const bf16* source, long stride, long count, long padded, int d, bf16* target) {
    for (long i = 0; i < count; i++) fetch_next_head<false>(source + i * stride, d);
    for (long i = 0; i < padded; i += LANES)
        for (int j = 0; j < d; j += 32, target += TILE) {
            __m512 v[16];
            for (int r = 0; r < 16; r++)
                v[r] = i + r < count ? load(reinterpret_cast<const float*>(source + (i + r) * stride + j))
                                     : _mm512_setzero_ps();
            transpose(v);
            for (int r = 0; r < 16; r++) store(reinterpret_cast<float*>(target + r * 32), v[r]);
        }
}

// Tiles [d / 16][W / 32] of values: row p of a tile holds 16 columns of tokens 2p and 2p + 1, in pairs.
OWN_LOOP inline void tile_values(const bf16* source, long stride, long count, long padded, int d, bf16* target) {
    for (long i = 0; i < count; i++) fetch_next_head<false>(source + i * stride, d);
    const auto widened = [&](long token, int column) {
        if (token >= count) return _mm512_setzero_si512();
        const bf16* place = source + token * stride + column;
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
    };
    for (int column = 0; column < d; column += LANES)
        for (long token = 0; token < padded; token += 2, target += 32) {
            const __m512i pair = _mm512_or_si512(widened(token, column), _mm512_slli_epi32(widened(token + 1, column), 16));
            _mm512_storeu_si512(target, pair);
        }
}

// C [32, 16 n] (+)= A [32, 32 k] times n columns of tiles, each k tiles long; n even. Strides in elements.
template <bool ADD>
OWN_LOOP void multiply_tiles(const bf16* a, long a_row, const bf16* tiles, int k, float* c, long c_row, int n) {
    for (int column = 0; column < n; column += 2) {
        const bf16 *left = tiles + static_cast<long>(column) * k * TILE, *right = left + static_cast<long>(k) * TILE;
        float* place = c + column * LANES;
        if constexpr (ADD) {
            _tile_loadd(0, place, c_row * 4);
            _tile_loadd(1, place + LANES, c_row * 4);
            _tile_loadd(2, place + 16 * c_row, c_row * 4);
            _tile_loadd(3, place + 16 * c_row + LANES, c_row * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int step = 0; step < k; step++) {
            _tile_loadd(4, a + 32 * step, a_row * 2);
            _tile_loadd(5, a + 16 * a_row + 32 * step, a_row * 2);
            _tile_loadd(6, left + step * TILE, 64);
            _tile_loadd(7, right + step * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, place, c_row * 4);
        _tile_stored(1, place + LANES, c_row * 4);
        _tile_stored(2, place + 16 * c_row, c_row * 4);
        _tile_stored(3, place + 16 * c_row + LANES, c_row * 4);
    }
}

inline void clear(bf16* target, long count) { std::fill(target, target + count, bf16{0}); }

// One query's scores, not scaled yet, to probabilities times their sum, in bfloat16, zeros from `length` to `padded`.
OWN_LOOP inline float softmax_to_bf16(float* scores, long length, long padded, float scale, const Dropout& dropout,
                                      const Keep& keep, float& greatest, bf16* probabilities) {
    const long whole = length / LANES * LANES;
    const __mmask16 tail = first_lanes(length - whole);
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (long j = 0; j < whole; j += LANES) most = _mm512_max_ps(most, load(scores + j));
    if (whole < length) most = max(most, choose(tail, load(scores + whole), most));
    greatest = scale * _mm512_reduce_max_ps(most);
    const __m512 less = _mm512_set1_ps(greatest), by = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    __mmask16 kept[2] = {0xFFFF, 0xFFFF};
    for (long j = 0; j < padded; j += LANES) {
        __m512 e = exp(_mm512_fmsub_ps(load(scores + j), by, less));
        if (j >= whole) e = _mm512_maskz_mov_ps(j == whole ? tail : 0, e);
        sum = _mm512_add_ps(sum, e);
        if (dropout.threshold) {
            const long vector = j / LANES;
            if (!(vector & 1)) keep.masks(vector >> 1, kept);
            e = _mm512_maskz_mov_ps(kept[vector & 1], e);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + j), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
    }
    return _mm512_reduce_add_ps(sum);
}

// attention_forward<bf16> for d a multiple of 32, on a processor with AMX whose use was granted to the process.
inline void attention_forward_amx(const Problem<bf16>& p, Rows<bf16> output, float* log_sums, long first, long last) {
    long longest = 0;
    for (long row = first; row < last; row++) longest = std::max<long>(longest, p.key_starts[row + 1] - p.key_starts[row]);
    const int d = p.width, chunks = d / 32;
    const long most = round_up(longest, 32);
    Scratch scratch;
    bf16* keys = scratch.take<bf16>(d * most);
    bf16* values = scratch.take<bf16>(d * most);
    bf16* queries = scratch.take<bf16>(QUERIES * d);
    float* scores = scratch.take<float>(QUERIES * most);
    bf16* probabilities = scratch.take<bf16>(QUERIES * most);
    float* mixed = scratch.take<float>(QUERIES * d);
    clear(queries, QUERIES * d);
    clear(probabilities, QUERIES * most);
    const Tiles tiles;
    for (long row = first; row < last; row++) {
        const long begin = p.key_starts[row], length = p.key_starts[row + 1] - begin;
        const long width = round_up(length, 32);
        for (long head = 0; head < p.heads; head++) {
            tile_keys(p.key.at(begin, head, d), p.key.stride, length, width, d, keys);
            tile_values(p.value.at(begin, head, d), p.value.stride, length, width, d, values);
            for (long q = p.query_starts[row]; q < p.query_starts[row + 1]; q += QUERIES) {
                const int count = static_cast<int>(std::min<long>(QUERIES, p.query_starts[row + 1] - q));
                const bf16* asking = p.query.at(q, head, d);
                long stride = p.query.stride;
                if (count < QUERIES) {  // a tile would read past the last query; what is left in `queries` is not used
                    for (int i = 0; i < count; i++) std::copy(asking + i * stride, asking + i * stride + d, queries + i * d);
                    asking = queries;
                    stride = d;
                }
                multiply_tiles<false>(asking, stride, keys, chunks, scores, width, static_cast<int>(width / LANES));
                float factors[QUERIES];
                for (int i = 0; i < count; i++) {
                    float greatest;
                    const Keep keep = p.dropout.keep(q + i, p.heads, head);
                    const float sum = softmax_to_bf16(scores + i * width, length, width, p.scale, p.dropout, keep, greatest,
                                                      probabilities + i * width);
                    factors[i] = p.dropout.scale / sum;
                    if (log_sums) log_sums[(q + i) * p.heads + head] = greatest + std::log(sum);
                }
                multiply_tiles<false>(probabilities, width, values, static_cast<int>(width / 32), mixed, d, d / LANES);
                for (int i = 0; i < count; i++) copy_out(mixed + i * d, d, factors[i], output.at(q + i, head, d));
            }
        }
    }
}

// target [d, 32] = source [32, d] transposed.
OWN_LOOP inline void transpose_queries(const bf16* source, long stride, int d, bf16* target) {
    for (int i = 0; i < QUERIES; i += LANES)
        for (int j = 0; j < d; j += LANES) {
            __m512 v[16];
            for (int r = 0; r < 16; r++) v[r] = load(source + (i + r) * stride + j);
            transpose(v);
            for (int r = 0; r < 16; r++) store(target + (j + r) * QUERIES + i, v[r]);
        }
}

// What the backward knows of one query, and where the gradients of its scores go.
struct BackwardQuery {
    const float *scores, *d_scores;  // products of query and keys, and of the output's gradient and the values
    float log_sum, inner;            // inner: the output times its gradient, summed
    Keep keep;
    bf16* row;  // gradients of the scores, in order
};

// Two queries: probabilities and gradients of the scores as rows of tiles, in pairs (see tile_values), the latter in
// order besides. `present` false for a second query that is not there: zeros.
OWN_LOOP inline void softmax_backward_pair(const BackwardQuery& one, const BackwardQuery& two, bool present, long length,
                                           long padded, float scale, const Dropout& dropout, bf16* probabilities,
                                           bf16* gradients) {
    const long whole = length / LANES * LANES;
    const __mmask16 tail = first_lanes(length - whole);
    const __m512 by = _mm512_set1_ps(scale), kept_by = _mm512_set1_ps(dropout.scale);
    const BackwardQuery* queries[2] = {&one, &two};
    __mmask16 kept[2][2] = {{0xFFFF, 0xFFFF}, {0xFFFF, 0xFFFF}};
    for (long j = 0; j < padded; j += LANES) {
        const __mmask16 real = j < whole ? 0xFFFF : j == whole ? tail : 0;
        const long vector = j / LANES;
        __m512i dropped[2], slope[2];
        for (int i = 0; i < 2; i++) {
            const BackwardQuery& q = *queries[i];
            const __mmask16 lanes = i == 0 || present ? real : 0;
            const __m512 raised = exp(_mm512_fmsub_ps(load(q.scores + j), by, _mm512_set1_ps(q.log_sum)));
            const __m512 probability = _mm512_maskz_mov_ps(lanes, raised);
            if (dropout.threshold && !(vector & 1)) q.keep.masks(vector >> 1, kept[i]);
            const __mmask16 stays = kept[i][vector & 1];
            const __m512 gradient = _mm512_maskz_mul_ps(stays, load(q.d_scores + j), kept_by);
            const __m512 through = _mm512_mul_ps(probability, _mm512_sub_ps(gradient, _mm512_set1_ps(q.inner)));
            const __m256i rounded = narrow(_mm512_maskz_mov_ps(lanes, through));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q.row + j), rounded);
            slope[i] = _mm512_cvtepu16_epi32(rounded);
            dropped[i] = _mm512_cvtepu16_epi32(narrow(_mm512_maskz_mul_ps(stays, probability, kept_by)));
        }
        const long tile = vector * TILE;
        _mm512_storeu_si512(probabilities + tile, _mm512_or_si512(dropped[0], _mm512_slli_epi32(dropped[1], 16)));
        _mm512_storeu_si512(gradients + tile, _mm512_or_si512(slope[0], _mm512_slli_epi32(slope[1], 16)));
    }
}

// attention_backward<bf16>, where attention_forward_amx runs.
inline void attention_backward_amx(const Problem<bf16>& p, Rows<const bf16> output, Rows<const bf16> gradient,
                                   const float* log_sums, Rows<bf16> d_query, Rows<bf16> d_key, Rows<bf16> d_value,
                                   long first, long last) {
    long longest = 0;
    for (long row = first; row < last; row++) longest = std::max<long>(longest, p.key_starts[row + 1] - p.key_starts[row]);
    const int d = p.width, chunks = d / 32;
    const long most = round_up(longest, 32);
    Scratch scratch;
    bf16* keys = scratch.take<bf16>(d * most);       // for scores
    bf16* values = scratch.take<bf16>(d * most);     // for the gradients of the probabilities
    bf16* key_rows = scratch.take<bf16>(d * most);   // for the gradients of the queries
    float* d_keys_t = scratch.take<float>(d * most);
    float* d_values_t = scratch.take<float>(d * most);
    bf16* queries = scratch.take<bf16>(QUERIES * d);
    bf16* outer = scratch.take<bf16>(QUERIES * d);
    bf16* queries_t = scratch.take<bf16>(QUERIES * d);
    bf16* outer_t = scratch.take<bf16>(QUERIES * d);
    float* scores = scratch.take<float>(QUERIES * most);
    float* d_scores = scratch.take<float>(QUERIES * most);
    bf16* rows = scratch.take<bf16>(QUERIES * most);
    bf16* row_pairs = scratch.take<bf16>(QUERIES * most);
    bf16* probability_pairs = scratch.take<bf16>(QUERIES * most);
    float* mixed = scratch.take<float>(QUERIES * d);
    const Tiles tiles;
    for (long row = first; row < last; row++) {
        const long begin = p.key_starts[row], length = p.key_starts[row + 1] - begin;
        const long width = round_up(length, 32);
        const int columns = static_cast<int>(width / LANES);
        for (long head = 0; head < p.heads; head++) {
            tile_keys(p.key.at(begin, head, d), p.key.stride, length, width, d, keys);
            tile_keys(p.value.at(begin, head, d), p.value.stride, length, width, d, values);
            tile_values(p.key.at(begin, head, d), p.key.stride, length, width, d, key_rows);
            std::fill(d_keys_t, d_keys_t + d * width, 0.0f);
            std::fill(d_values_t, d_values_t + d * width, 0.0f);
            for (long q = p.query_starts[row]; q < p.query_starts[row + 1]; q += QUERIES) {
                const int count = static_cast<int>(std::min<long>(QUERIES, p.query_starts[row + 1] - q));
                for (int i = 0; i < count; i++) {
                    const bf16 *asking = p.query.at(q + i, head, d), *wanted = gradient.at(q + i, head, d);
                    fetch_next_head<false>(asking, d);
                    fetch_next_head<false>(wanted, d);
                    std::copy(asking, asking + d, queries + i * d);
                    std::copy(wanted, wanted + d, outer + i * d);
                }
                if (count < QUERIES) {  // rows that are not there bring nothing
                    clear(queries + count * d, (QUERIES - count) * d);
                    clear(outer + count * d, (QUERIES - count) * d);
                    clear(rows, QUERIES * width);
                    clear(row_pairs, QUERIES * width);
                    clear(probability_pairs, QUERIES * width);
                }
                multiply_tiles<false>(queries, d, keys, chunks, scores, width, columns);
                multiply_tiles<false>(outer, d, values, chunks, d_scores, width, columns);
                const auto query = [&](int i) {
                    const int known = std::min(i, count - 1);
                    return BackwardQuery{scores + i * width,
                                         d_scores + i * width,
                                         log_sums[(q + known) * p.heads + head],
                                         inner_product(output.at(q + known, head, d), outer + known * d, d),
                                         p.dropout.keep(q + known, p.heads, head),
                                         rows + i * width};
                };
                for (int i = 0; i < count; i += 2)
                    softmax_backward_pair(query(i), query(i + 1), i + 1 < count, length, width, p.scale, p.dropout,
                                          probability_pairs + i / 2 * 32, row_pairs + i / 2 * 32);
                multiply_tiles<false>(rows, width, key_rows, static_cast<int>(width / 32), mixed, d, d / LANES);
                for (int i = 0; i < count; i++) copy_out(mixed + i * d, d, p.scale, d_query.at(q + i, head, d));
                transpose_queries(queries, d, d, queries_t);
                transpose_queries(outer, d, d, outer_t);
                for (int j = 0; j < d; j += QUERIES) {
                    multiply_tiles<true>(queries_t + j * QUERIES, QUERIES, row_pairs, 1, d_keys_t + j * width, width, columns);
                    multiply_tiles<true>(outer_t + j * QUERIES, QUERIES, probability_pairs, 1, d_values_t + j * width, width, columns);
                }
            }
            store_transposed(d_keys_t, width, length, d, p.scale, d_key.at(begin, head, d), d_key.stride);
            store_transposed(d_values_t, width, length, d, 1.0f, d_value.at(begin, head, d), d_value.stride);
        }
    }
}

}  // namespace kernels

#endif
