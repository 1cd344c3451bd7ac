// Vectors of ROOST_LANES floats, and the four functions the model needs on them: exp, expm1, tanh, sigmoid.
//
// Included by one translation unit per instruction set, everything in an anonymous namespace: nothing compiled for a
// newer instruction set may leak into code that an older machine runs. The width is the machine's own: wider vectors
// would be passed through memory.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int lanes = ROOST_LANES;
typedef float V __attribute__((vector_size(4 * ROOST_LANES)));
typedef int32_t I __attribute__((vector_size(4 * ROOST_LANES)));
typedef float Unaligned __attribute__((vector_size(4 * ROOST_LANES), aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline V splat(float x) { return V{} + x; }
inline V as_float(I x) { return reinterpret_cast<V>(x); }
inline I as_int(V x) { return reinterpret_cast<I>(x); }
inline V maximum(V a, V b) { return a > b ? a : b; }
inline V minimum(V a, V b) { return a < b ? a : b; }
inline V absolute(V x) { return as_float(as_int(x) & 0x7fffffff); }

inline V fma(V a, V b, V c) {
#if ROOST_LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif ROOST_LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;  // the baseline has no fused instruction
#endif
}

inline float sum(V x) {  // a fixed order: halves folded onto each other
    float part[lanes];
    store(part, x);
    for (int width = lanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

// 1.5 * 2^23: adding it rounds |x| < 2^22 to the nearest integer, ties to even, and leaves that integer in the low bits
constexpr float rounder = 12582912.f;
inline I round_to_int(V x) { return as_int(x + rounder) - as_int(splat(rounder)); }

// exp(x) = scale * (1 + fraction) with scale a power of two and |fraction| <= sqrt(2) - 1, both free of cancellation
struct Exponential { V scale, fraction; };
inline Exponential split_exp(V x) {
    x = minimum(maximum(x, splat(-88.f)), splat(88.f));
    const V n = (x * 1.44269504f + rounder) - rounder;
    V r = fma(n, splat(-0.693145752f), x);  // ln 2 in two parts
    r = fma(n, splat(-1.42860677e-6f), r);
    V q = splat(1.f / 5040);
    q = fma(q, r, splat(1.f / 720));
    q = fma(q, r, splat(1.f / 120));
    q = fma(q, r, splat(1.f / 24));
    q = fma(q, r, splat(1.f / 6));
    q = fma(q, r, splat(0.5f));
    const I exponent = round_to_int(n);
    return {as_float((exponent + 127) << 23), fma(q * r, r, r)};
}
inline V exp(V x) {
    const Exponential e = split_exp(x);
    return x < -87.3f ? V{} : fma(e.scale, e.fraction, e.scale);
}
inline V expm1(V x) {
    const Exponential e = split_exp(x);
    return fma(e.scale, e.fraction, e.scale - 1.f);
}
inline V sigmoid(V x) { return 1.f / (1.f + exp(-x)); }
inline V tanh(V x) {
    const V e = expm1(minimum(2.f * absolute(x), splat(20.f)));
    const V y = e / (e + 2.f);
    return as_float(as_int(y) | (as_int(x) & INT32_MIN));
}

}  // namespace
