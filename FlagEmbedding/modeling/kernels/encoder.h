// A whole encoder (XLM-R, RoBERTa, BERT; dense or with one expert a token) over rows without padding, forward only,
// float32, on one thread: for a single query nothing is left outside but the tokenizer.
//
// Shape legend: N rows, T tokens in all, D hidden size, I the wide width of the feed-forward, E experts.
#pragma once

#include "attention.h"
#include "products.h"

namespace kernels {

struct Norm {
    const float *weight, *bias;
    double epsilon;
};

struct Layer {
    Linear query, key, value, output;
    Norm attention_norm;
    const Linear* wide;    // [wide_experts]
    const Linear* narrow;  // [narrow_experts]
    int64_t wide_experts, narrow_experts;
    const float* gate;  // [E, D] or [E, I]: of the one that has several experts; null where none has
    Norm output_norm;
};

struct Encoder {
    const float *words, *positions, *type;  // [vocabulary, D], [longest, D], [D]
    int64_t vocabulary, longest;
    int64_t padding;  // positions begin behind this id, which has its own; below 0: they begin at 0
    Norm norm;
    const Layer* layers;
    int64_t count, hidden, heads;
};

inline void normalize_rows(const Norm& norm, const float* y, const float* residual, float* out, long rows, long width) {
    AddNorm<float, float>{y,   residual, norm.weight, norm.bias, nullptr, out, nullptr, nullptr, width,
                          static_cast<float>(norm.epsilon), 0, 1.0f, 0}
        .forward(0, rows);
}

// x [T, D] of the tokens; gives the first token that the tables have no line for, or -1.
inline long embed(const Encoder& e, const int64_t* ids, const int32_t* starts, long rows, float* x) {
    const long d = e.hidden;
    Scratch scratch;
    float* sum = scratch.take<float>(d);
    for (long row = 0; row < rows; row++) {
        long counted = 0;
        for (long t = starts[row]; t < starts[row + 1]; t++) {
            const long place = e.padding < 0 ? t - starts[row] : ids[t] == e.padding ? e.padding : ++counted + e.padding;
            if (ids[t] < 0 || ids[t] >= e.vocabulary || place >= e.longest) return t;
            const float *word = e.words + ids[t] * d, *position = e.positions + place * d;
            for (long j = 0; j < d; j += LANES) store(sum + j, load(word + j) + load(position + j));
            normalize_rows(e.norm, sum, e.type, x + t * d, 1, d);
        }
    }
    return -1;
}

// The rows of each expert: `order` [rows] sorted by expert, `ends` [experts].
inline void route(const float* gate, long experts, const float* x, long rows, long width, int32_t* order, int32_t* ends) {
    int32_t chosen[ROW_BLOCK];
    for (long t = 0; t < rows; t++) {
        float most = -std::numeric_limits<float>::infinity();
        chosen[t] = 0;
        for (long e = 0; e < experts; e++) {
            const float logit = inner_product(x + t * width, gate + e * width, static_cast<int>(width));
            if (logit > most) most = logit, chosen[t] = static_cast<int32_t>(e);
        }
    }
    int32_t used = 0;
    for (long e = 0; e < experts; e++) {
        for (long t = 0; t < rows; t++)
            if (chosen[t] == e) order[used++] = static_cast<int32_t>(t);
        ends[e] = used;
    }
}

// y = x W^T + bias with each row's own expert; at most ROW_BLOCK rows.
inline void expert_product(const Linear* linears, long experts, const float* gate, const float* x, long rows, float* y,
                           int32_t* order, int32_t* ends) {
    const long inputs = linears->inputs, outputs = linears->outputs;
    if (experts == 1) return product(*linears, {x, inputs}, rows, {y, outputs});
    route(gate, experts, x, rows, inputs, order, ends);
    for (long e = 0, first = 0; e < experts; first = ends[e++])
        product(linears[e], {x, inputs, order + first}, ends[e] - first, {y, outputs, order + first});
}

// Everything of a layer behind its attention, `context` and x [rows, D], x in place: products of a few rows at a time,
// whose wide activations stay in the second cache.
inline void finish_layer(const Layer& layer, const float* context, float* x, long rows, long d) {
    const long wide_width = layer.wide->outputs;
    Scratch scratch;
    float* y = scratch.take<float>(ROW_BLOCK * d);
    float* wide = scratch.take<float>(ROW_BLOCK * wide_width);
    int32_t* order = scratch.take<int32_t>(ROW_BLOCK);
    int32_t* ends = scratch.take<int32_t>(std::max(layer.wide_experts, layer.narrow_experts));
    for (long row = 0; row < rows; row += ROW_BLOCK) {
        const long count = std::min(ROW_BLOCK, rows - row);
        float* own = x + row * d;
        product(layer.output, {context + row * d, d}, count, {y, d});
        normalize_rows(layer.attention_norm, y, own, own, count, d);
        expert_product(layer.wide, layer.wide_experts, layer.gate, own, count, wide, order, ends);
        gelu_forward(wide, wide, count * wide_width);
        expert_product(layer.narrow, layer.narrow_experts, layer.gate, wide, count, y, order, ends);
        normalize_rows(layer.output_norm, y, own, own, count, d);
    }
}

// Last hidden states of T tokens, `output` [T, D], or [N, D] where only each row's first token is asked for; `starts`
// [N + 1]. Gives -1, or the number of a token that is not in the tables, where nothing was computed.
inline long encode(const Encoder& e, const int64_t* ids, const int32_t* starts, long rows, bool first_only, float* output) {
    const long d = e.hidden, tokens = starts[rows];
    const int width = static_cast<int>(d / e.heads);
    Scratch scratch;
    float* x = first_only ? scratch.take<float>(tokens * d) : output;
    const long unknown = embed(e, ids, starts, rows, x);
    if (unknown >= 0) return unknown;
    float* query = scratch.take<float>(tokens * d);
    float* both = scratch.take<float>(tokens * 2 * d);
    float* context = scratch.take<float>(tokens * d);
    int32_t* numbers = scratch.take<int32_t>(rows + 1);
    for (long row = 0; row <= rows; row++) numbers[row] = static_cast<int32_t>(row);
    for (long number = 0; number < e.count; number++) {
        const Layer& layer = e.layers[number];
        const bool first = first_only && number == e.count - 1;
        product(layer.key, {x, d}, tokens, {both, 2 * d});
        product(layer.value, {x, d}, tokens, {both + d, 2 * d});
        product(layer.query, {x, d, first ? starts : nullptr}, first ? rows : tokens, {query, d});
        const Problem<float> problem{{query, d}, {both, 2 * d}, {both + d, 2 * d}, first ? numbers : starts, starts, e.heads, width,
                                     1.0f / std::sqrt(static_cast<float>(width)), {0, 1.0f, 0}};
        attention_forward<float>(problem, {context, d}, nullptr, 0, rows);
        if (first)
            for (long row = 0; row < rows; row++) std::copy_n(x + starts[row] * d, d, output + row * d);
        finish_layer(layer, context, first ? output : x, first ? rows : tokens, d);
    }
    if (first_only && e.count == 0)
        for (long row = 0; row < rows; row++) std::copy_n(x + starts[row] * d, d, output + row * d);
    return -1;
}

}  // namespace kernels
