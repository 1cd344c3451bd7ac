// The CPU model's data: packed matrices, the weights of a layer, and one pass over tokens of many sequences.
//
// Plain structs: they are shared by translation units of different instruction sets (see simd.h).
#pragma once
#include "pool.h"

#include <cstdint>

namespace roost {

constexpr long panel = 32;  // outputs that share a panel of a packed matrix
constexpr long unit = 64;   // columns that one thread owns together: a quantisation group of activations, two panels

enum class Format : int { f32, w16, bf16, i8, i8_fine, i4 };  // layouts: docs/native.md
enum class Inputs : int { f32, bf16, s8, s16 };                // how activations meet a format

static inline long round_up(long n, long to) { return (n + to - 1) / to * to; }
static inline Inputs inputs_of(Format f) {
    return f == Format::bf16 ? Inputs::bf16 : f == Format::i8_fine ? Inputs::s16
           : f == Format::i8 || f == Format::i4 ? Inputs::s8 : Inputs::f32;
}
// Of 32 outputs; K is padded to whole groups where there are groups. formats/panels.py has the same sizes: `roost info`
// reads packed files without this library.
static inline long panel_bytes(Format f, long K) {
    const long Kp = round_up(K, unit);
    switch (f) {
        case Format::f32: return 128 * K;
        case Format::w16: return 64 * K;
        case Format::bf16: return 64 * Kp;
        case Format::i4: return 18 * Kp + 128;
        default: return 33 * Kp;
    }
}

struct Matrix {              // y = W x: N outputs, K inputs, in panels of 32 outputs
    Format format;
    long N, K;
    const uint8_t* data;     // null: absent
    const uint8_t* at(long p) const { return data + p * panel_bytes(format, K); }
    long panels() const { return (N + panel - 1) / panel; }
};

struct Activations {         // M rows of K inputs in the form a matrix wants
    Inputs kind;
    long K;                  // padded to a multiple of 64
    void* values;            // f32, bf16, or integers (see prepare in matmul.inl), row stride K elements
    int8_t* low;             // s16 with byte dot products: the low bytes; `values` then holds the high ones
    float* scale;            // s8, s16: one per row and group of 64
    int32_t* sum;            // s8, s16: sum of the integers per row and 32 inputs, which takes the weights' zeros out
    const int32_t *nonzero, *starts;  // null, or of a single row the blocks that hold something: see matmul.inl
};

struct Layer {
    const float *ln1_w, *ln1_b, *ln2_w, *ln2_b, *lnx_w, *lnx_b;
    const float *mix_x, *mix[5];        // Finch: maa_x and w, k, v, r, g; Eagle: -, then -, k, v, r, g
    const float *decay, *bonus;         // Finch: base of the decay; Eagle: decay of every channel. Then u
    const float *ffn_mix_k, *ffn_mix_r;
    Matrix shift1, shift2[5], decay1, decay2;   // low-rank matrices, Finch only
    Matrix r, k, v, g, o, ffn_k, ffn_r, ffn_v;
};

struct Model {
    int finch, gate, skip_zeros;
    long L, D, A, F, V, N;              // layers, width, width of time mixing, of channel mixing, vocabulary, head size
    long shift_rank, decay_rank;
    float group_norm_eps;
    const float *ln0_w, *ln0_b, *ln_out_w, *ln_out_b;
    const void* embedding;              // (V, D) rows
    int embedding_bf16;
    Matrix head;
    Layer* layers;
};

static inline long nonzero_room(long F) { return round_up(F, unit) + round_up(F, unit) / 32 + 16; }

struct LayerState { const float *att, *wkv, *ffn; float *att_out, *wkv_out, *ffn_out; };  // (n, D), (n, H, N, N), (n, D)

struct Pass {                           // M tokens of n sequences, packed one after another
    long M, n;
    const long* offsets;                // n + 1, from 0 to M
    const int32_t* tokens;              // M ids, or null with
    const float* embeddings;            // (M, D)
    const LayerState* state;            // L; out may be the same memory as in
    const long* wanted;                 // rows of which logits are asked
    long n_wanted;
    float* logits;                      // (n_wanted, V)
    // scratch
    float *x, *normed, *low, *r, *k, *v, *g, *decay_low, *receptance;
    float* own;                         // per thread: two tiles of M * 64 floats
    long own_stride;
    int32_t* nonzero;                   // per thread: nonzero_room(F) numbers
    Activations shift_in, in[5], out_in, ffn_k_in, ffn_r_in, ffn_v_in, head_in;  // in: of decay1, k, v, r, g, as Layer::mix
    long* zeros;                        // per thread: inputs of ffn.value that were zero
};

struct Product {                        // out (M, N) = x (M, K) W^T, alone: for tests and measurements
    Matrix W;
    Activations in;
    const float* x;
    long M;
    float *out, *own;
};

struct Kernels {                        // of one instruction set
    void (*forward)(const Model&, const Pass&, const Region&);
    void (*product)(const Product&, const Region&);
};
extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_amx;

}  // namespace roost
