// Products of rows of tokens with the weights of a linear layer, float32. The weights are laid out once in panels that
// are read from end to end, so that few rows (a single query) take each weight from memory once, ahead of its use.
//
// Every element is added up over the inputs in their order, whatever rows stand beside it: a row's result depends on
// nothing but the row, to the last bit.
//
// Shape legend: K inputs and M outputs of a layer; a panel is PANEL outputs, a block of it at most DEPTH inputs.
#pragma once

#include "pointwise.h"

namespace kernels {

constexpr int PANEL_VECTORS = LANES == 4 ? 4 : 2;
constexpr int PANEL = PANEL_VECTORS * LANES;
constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;     // with the panel's vectors and one more they fill the registers
constexpr long DEPTH = LANES == 16 ? 256 : 384;     // a panel's block of inputs lies in the first cache
constexpr long ROW_BLOCK = 48;                      // rows whose activations lie in the second cache

struct Linear {
    const float* panels;  // [blocks of inputs][M / PANEL rounded up][inputs of the block][PANEL], 0 past M
    const float* bias;    // [M] or null
    int64_t inputs, outputs;
};

// Inputs of a block (the last one may have fewer).
inline long block_depth(long inputs) {
    const long blocks = (inputs + DEPTH - 1) / DEPTH;
    return (inputs + blocks - 1) / blocks;
}

// `panels` of a weight [M, K].
inline void lay_out_panels(const float* weight, long inputs, long outputs, float* panels) {
    const long depth = block_depth(inputs);
    for (long begin = 0; begin < inputs; begin += depth) {
        const long end = std::min(begin + depth, inputs);
        for (long panel = 0; panel < outputs; panel += PANEL)
            for (long k = begin; k < end; k++)
                for (long m = panel; m < panel + PANEL; m++) *panels++ = m < outputs ? weight[m * inputs + k] : 0.0f;
    }
}

// Rows of a matrix, all in turn or those that `which` names.
template <typename T>
struct Picked {
    T* data;
    long stride;
    const int32_t* which = nullptr;
    T* row(long number) const { return data + (which ? which[number] : number) * stride; }
    Picked from(long first) const { return which ? Picked{data, stride, which + first} : Picked{data + first * stride, stride}; }
};

// R rows of the product with one block of a panel; `bias` where it is the first block, else added to what is there.
template <int R>
OWN_LOOP void panel_tile(Picked<const float> x, long begin, long depth, const float* panel, const float* bias,
                         bool first, Picked<float> y, long column, int vectors) {
    vec sum[R][PANEL_VECTORS];
    const float* rows[R];
    for (int i = 0; i < R; i++) {
        rows[i] = x.row(i) + begin;
        for (int j = 0; j < PANEL_VECTORS; j++) sum[i][j] = vec{};
    }
    const long next = depth * PANEL;  // the panel behind this one
    for (long k = 0; k < depth; k++) {
        vec right[PANEL_VECTORS];
        for (int j = 0; j < PANEL_VECTORS; j++) right[j] = load(panel + k * PANEL + j * LANES);
        for (int j = 0; j < PANEL; j += 16) __builtin_prefetch(panel + k * PANEL + next + j);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const vec left = all(rows[i][k]);
            for (int j = 0; j < PANEL_VECTORS; j++) sum[i][j] = fma(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < vectors; j++) {
            float* place = y.row(i) + column + j * LANES;
            const vec before = !first ? load(place) : bias ? load(bias + column + j * LANES) : vec{};
            store(place, before + sum[i][j]);
        }
}

// A tile of `rows` rows, at most R of them.
template <int R, typename... Arguments>
inline void panel_rows(long rows, Arguments... arguments) {
    if (rows == R) return panel_tile<R>(arguments...);
    if constexpr (R > 1) panel_rows<R - 1>(rows, arguments...);
}

// y = x W^T + bias, `rows` rows; M a multiple of 16.
inline void product(const Linear& linear, Picked<const float> x, long rows, Picked<float> y) {
    const long depth = block_depth(linear.inputs);
    for (long block = 0; block < rows; block += ROW_BLOCK) {
        const long count = std::min(ROW_BLOCK, rows - block), tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        const float* panel = linear.panels;
        for (long begin = 0; begin < linear.inputs; begin += depth) {
            const long inputs = std::min(depth, linear.inputs - begin);
            for (long column = 0; column < linear.outputs; column += PANEL, panel += inputs * PANEL) {
                const int vectors = static_cast<int>(std::min<long>(PANEL, linear.outputs - column) / LANES);
                for (long t = 0; t < tiles; t++) {  // tiles of about one size: a tile of few rows waits for its sums
                    const long row = count * t / tiles, end = count * (t + 1) / tiles;
                    panel_rows<TILE_ROWS>(end - row, x.from(block + row), begin, inputs, panel, linear.bias, begin == 0,
                                          y.from(block + row), column, vectors);
                }
            }
        }
    }
}

}  // namespace kernels
