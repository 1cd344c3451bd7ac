// The units of packed weights (pack.cpp) and the table of rounding kernels that each instruction set fills.
#pragma once
#include "model.h"

namespace roost {

constexpr long strip = 8, group8 = 64, group4 = 32;  // outputs rounded together; inputs that share a scale
constexpr long group8_bytes = 33 * group8, group4_bytes = 18 * group4;

typedef float F8 __attribute__((vector_size(32), aligned(32)));  // aligned: the baseline would say 16
typedef int32_t I8 __attribute__((vector_size(32), aligned(32)));

struct Fit { F8 d, m; };                              // the real step and offset of one int4 group

// x [Kp] inputs of eight outputs in units of `unit`, h [Kp] 1, or 0 for padding, lane: the first of them in
// the panel, out: the panel, fits [Kp / 32]: scratch.
struct Quantisers {
    void (*i8)(const F8* x, const F8& unit, const float* h, long Kp, long lane, uint8_t* out);
    void (*i4)(const F8* x, const F8& unit, const float* h, long K, long Kp, long lane, uint8_t* out, Fit* fits);
};
extern const Quantisers quantisers_scalar, quantisers_avx2;

namespace {

inline uint16_t to_bf16(float x) {                    // to nearest even; NaN stays NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

}  // namespace
}  // namespace roost
