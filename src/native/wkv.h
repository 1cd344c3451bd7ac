// WKV on a CPU: what the kernels of every instruction set (wkv_body.inl) and the calls from Python (wkv.cpp) share.
//
//     out_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)          S_t = diag(exp(log_w_t)) S_{t-1} + k_t v_t^T
//
// A kernel computes one head of one row, from its first token to its last: who calls it, with how many threads and in
// which company, cannot change a bit of the result.
#pragma once

namespace roost::wkv {

constexpr long block_tokens = 64;            // the backward pass restarts from a state saved every so many tokens
constexpr int head_sizes[] = {32, 64, 128};  // K = V that have kernels

struct Head {                                // steps: elements from a token to the next
    const void *r, *k, *v;                   // fp32 or bf16
    const float *log_w, *u;                  // log_w with step 0: static decay (Eagle)
    const float* state;                      // [k][v], before the first token
    long r_step, k_step, v_step, w_step, tokens;
    bool bf16;
};

struct Forward : Head {                      // writes value columns [first, last) only: columns are independent
    float* after;                            // [k][v], after the last token
    float* saved;                            // null, or the states before blocks 1, 2, ..
    void* out;
    long saved_step, out_step;
    int first, last;
};

struct Backward : Head {
    const float *saved, *d_after;
    const void* g;                           // gradient of out
    void *dr, *dk, *dv;                      // all with `step`, as `d_log_w` of a decay per token
    float *d_log_w, *du, *d_state;           // static decay: d_log_w is one row; it and du start at zero
    long saved_step, g_step, step;
};

struct Kernels {                             // by index into head_sizes
    void (*forward[3])(const Forward&, void* scratch);
    void (*backward[3])(const Backward&, void* scratch);
    unsigned long forward_bytes[3], backward_bytes[3];   // of scratch, aligned to 64, per thread
};

extern const Kernels baseline, avx2, avx512;

}  // namespace roost::wkv
