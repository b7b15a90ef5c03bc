// What Python calls (by ctypes): plain C functions over pointers, no Python and no torch. See __init__.py.
#include "attention.h"
#include "attention_amx.h"
#include "encoder.h"
#include "pointwise.h"

using namespace kernels;

extern "C" {

// Everything about one attention call but its gradients; the Python side fills it in.
struct AttentionCall {
    const void* query;
    const void* key;
    const void* value;
    int64_t query_stride, key_stride;
    const int32_t* query_starts;
    const int32_t* key_starts;
    int64_t first, last;  // rows to compute
    int64_t heads, width;
    float scale, dropout_scale;
    uint32_t dropout_threshold;
    uint64_t seed;
    void* output;
    int64_t output_stride;
    float* log_sums;
    const void* gradient;
    int64_t gradient_stride;
    void* d_query;
    void* d_key;
    void* d_value;
};

// LayerNorm(dropout(y) + residual) and its gradients.
struct AddNormCall {
    const void* y;
    const void* residual;
    const void* weight;
    const void* bias;
    void* sums;
    void* out;
    float* means;
    float* inverses;
    int64_t width;
    float epsilon, dropout_scale;
    uint32_t dropout_threshold;
    uint64_t seed;
    const void* d_out;
    void* d_y;
    void* d_residual;
};
}

namespace {

template <typename T>
Problem<T> problem(const AttentionCall& c) {
    return {{static_cast<const T*>(c.query), c.query_stride},
            {static_cast<const T*>(c.key), c.key_stride},
            {static_cast<const T*>(c.value), c.key_stride},
            c.query_starts,
            c.key_starts,
            c.heads,
            static_cast<int>(c.width),
            c.scale,
            {c.dropout_threshold, c.dropout_scale, c.seed}};
}

template <typename T>
void forward(const AttentionCall& c) {
    attention_forward<T>(problem<T>(c), {static_cast<T*>(c.output), c.output_stride}, c.log_sums, c.first, c.last);
}

template <typename T>
void backward(const AttentionCall& c) {
    attention_backward<T>(problem<T>(c), {static_cast<const T*>(c.output), c.output_stride},
                          {static_cast<const T*>(c.gradient), c.gradient_stride}, c.log_sums,
                          {static_cast<T*>(c.d_query), c.query_stride}, {static_cast<T*>(c.d_key), c.key_stride},
                          {static_cast<T*>(c.d_value), c.key_stride}, c.first, c.last);
}

template <typename Y, typename R>
AddNorm<Y, R> add_norm(const AddNormCall& c) {
    return {static_cast<const Y*>(c.y),
            static_cast<const R*>(c.residual),
            static_cast<const R*>(c.weight),
            static_cast<const R*>(c.bias),
            static_cast<R*>(c.sums),
            static_cast<R*>(c.out),
            c.means,
            c.inverses,
            c.width,
            c.epsilon,
            c.dropout_threshold,
            c.dropout_scale,
            c.seed};
}

template <typename Y, typename R>
void add_norm_forward(const AddNormCall& c, int64_t first, int64_t last) {
    add_norm<Y, R>(c).forward(first, last);
}

template <typename Y, typename R>
void add_norm_backward(const AddNormCall& c, float* d_weight, float* d_bias, int64_t first, int64_t last) {
    add_norm<Y, R>(c).backward(static_cast<const R*>(c.d_out), static_cast<Y*>(c.d_y), static_cast<R*>(c.d_residual),
                               d_weight, d_bias, first, last);
}

}  // namespace

extern "C" {

void attention_forward_f32(const AttentionCall* call) { forward<float>(*call); }
void attention_forward_bf16(const AttentionCall* call) { forward<bf16>(*call); }
void attention_backward_f32(const AttentionCall* call) { backward<float>(*call); }
void attention_backward_bf16(const AttentionCall* call) { backward<bf16>(*call); }

// Elements [first, last).
void gelu_forward_f32(const float* x, float* y, int64_t first, int64_t last) {
    gelu_forward(x + first, y + first, last - first);
}
void gelu_forward_bf16(const bf16* x, bf16* y, int64_t first, int64_t last) {
    gelu_forward(x + first, y + first, last - first);
}
void gelu_backward_f32(const float* x, const float* d_y, float* d_x, int64_t first, int64_t last) {
    gelu_backward(x + first, d_y + first, d_x + first, last - first);
}
void gelu_backward_bf16(const bf16* x, const bf16* d_y, bf16* d_x, int64_t first, int64_t last) {
    gelu_backward(x + first, d_y + first, d_x + first, last - first);
}

// Rows [first, last); named by the dtype of y, then that of the residual.
void add_norm_forward_f32_f32(const AddNormCall* c, int64_t first, int64_t last) {
    add_norm_forward<float, float>(*c, first, last);
}
void add_norm_forward_bf16_f32(const AddNormCall* c, int64_t first, int64_t last) {
    add_norm_forward<bf16, float>(*c, first, last);
}
void add_norm_forward_bf16_bf16(const AddNormCall* c, int64_t first, int64_t last) {
    add_norm_forward<bf16, bf16>(*c, first, last);
}
void add_norm_backward_f32_f32(const AddNormCall* c, float* d_weight, float* d_bias, int64_t first, int64_t last) {
    add_norm_backward<float, float>(*c, d_weight, d_bias, first, last);
}
void add_norm_backward_bf16_f32(const AddNormCall* c, float* d_weight, float* d_bias, int64_t first, int64_t last) {
    add_norm_backward<bf16, float>(*c, d_weight, d_bias, first, last);
}
void add_norm_backward_bf16_bf16(const AddNormCall* c, float* d_weight, float* d_bias, int64_t first, int64_t last) {
    add_norm_backward<bf16, bf16>(*c, d_weight, d_bias, first, last);
}

#ifdef __AMX_TILE__
// For a width that is a multiple of 32, where the processor has AMX and the process may use it.
void attention_forward_bf16_amx(const AttentionCall* call) {
    attention_forward_amx(problem<bf16>(*call), {static_cast<bf16*>(call->output), call->output_stride}, call->log_sums,
                          call->first, call->last);
}
void attention_backward_bf16_amx(const AttentionCall* call) {
    const AttentionCall& c = *call;
    attention_backward_amx(problem<bf16>(c), {static_cast<const bf16*>(c.output), c.output_stride},
                           {static_cast<const bf16*>(c.gradient), c.gradient_stride}, c.log_sums,
                           {static_cast<bf16*>(c.d_query), c.query_stride}, {static_cast<bf16*>(c.d_key), c.key_stride},
                           {static_cast<bf16*>(c.d_value), c.key_stride}, c.first, c.last);
}
#endif

int64_t vector_lanes() { return LANES; }

// Floats that a weight [outputs, inputs] takes in panels, and the laying out.
int64_t panel_size(int64_t inputs, int64_t outputs) { return inputs * round_up(outputs, PANEL); }
void panels_f32(const float* weight, int64_t inputs, int64_t outputs, float* panels) {
    lay_out_panels(weight, inputs, outputs, panels);
}

// See encoder.h.
int64_t encode_f32(const Encoder* encoder, const int64_t* ids, const int32_t* starts, int64_t rows, int32_t first_only,
                   float* output) {
    return encode(*encoder, ids, starts, rows, first_only != 0, output);
}

// A product alone, for tests.
void product_f32(const Linear* linear, const float* x, int64_t rows, float* y) {
    product(*linear, {x, linear->inputs}, rows, {y, linear->outputs});
}

// The sources that this was compiled from (setup.py says).
const char* kernel_sources() { return KERNEL_SOURCES; }

// The mask of one stream of dropout, `count` bytes: 1 keep, 0 drop.
void keep_mask(uint64_t seed, uint64_t stream, uint32_t threshold, int64_t count, uint8_t* mask) {
    const Keep keep(seed, stream, threshold);
    Masks kept(&keep);
    for (int64_t start = 0; start < count; start += LANES) {
        const auto lanes = kept.at(start);
        for (int64_t i = start; i < std::min<int64_t>(count, start + LANES); i++)
            mask[i] = has_lane(lanes, static_cast<int>(i - start));
    }
}
}
