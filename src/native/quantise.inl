// Rounding of eight outputs (a strip) to int8 and int4, one output per vector lane; the layouts are in docs/native.md.
//
// Included once for every instruction set. Only single operations that IEEE 754 defines, in a fixed order, and no fused
// ones: every instruction set writes the same bytes.
#include "pack.h"

namespace roost {
namespace {

inline F8 broadcast(float x) { return F8{} + x; }
inline F8 smaller(F8 a, F8 b) { return a < b ? a : b; }
inline F8 larger(F8 a, F8 b) { return a > b ? a : b; }
inline F8 nearest(F8 x) { return (x + 12582912.0f) - 12582912.0f; }  // to even, for |x| < 2^22
inline F8 clamp(F8 x, float low, float high) { return smaller(larger(x, broadcast(low)), broadcast(high)); }

// ---- int8: the scale among a few neighbouring bf16 numbers whose squared error is least -----------------

inline F8 error8(const F8* x, const float* h, F8 scale) {
    const F8 inverse = scale > 0 ? 1.0f / scale : F8{};
    F8 sum{};
    for (long k = 0; k < group8; k++) {
        const F8 e = x[k] - clamp(nearest(x[k] * inverse), -128, 127) * scale;
        sum += h[k] * e * e;
    }
    return sum;
}

void pack_i8(const F8* x, const F8& unit, const float* h, long Kp, long lane, uint8_t* out) {
    for (long k0 = 0; k0 < Kp; k0 += group8, x += group8, h += group8, out += group8_bytes) {
        F8 most{};
        for (long k = 0; k < group8; k++) most = larger(most, larger(x[k], -x[k]));
        F8 best_error = broadcast(3e38f), best{};
        for (int step = -2; step <= 5; step++) {
            F8 scale;
            for (int n = 0; n < strip; n++)
                scale[n] = most[n] < 1e-30f ? 0 : from_bf16(static_cast<uint16_t>(to_bf16(most[n] / 127.5f) + step));
            const F8 error = error8(x, h, scale);
            best = error < best_error ? scale : best;
            best_error = smaller(error, best_error);
        }
        const F8 inverse = best > 0 ? 1.0f / best : F8{};
        for (long k = 0; k < group8; k++) {
            const F8 code = clamp(nearest(x[k] * inverse), -128, 127) + 128.0f;
            for (int n = 0; n < strip; n++)
                out[k / 4 * 4 * panel + (lane + n) * 4 + k % 4] = static_cast<uint8_t>(code[n]);
        }
        for (int n = 0; n < strip; n++) {
            const uint16_t scale = to_bf16(best[n] * unit[n]);
            __builtin_memcpy(out + group8 * panel + 2 * (lane + n), &scale, 2);
        }
    }
}

// ---- int4 --------------------------------------------------------------------------------------------------------
//
// First every group gets the real step d and offset m = d z that fit it best: for steps from 0.6 to 1.05 of the one that
// spans all weights, round to codes, solve the least squares problem for (d, m) given the codes, keep the best. The
// largest step of a row fixes R. Then the 8-bit step and the zero in sixteenths are searched around those values, with
// codes rounded anew for each, because what counts is the error of the numbers that are really stored.

struct Sums { F8 x{}, q{}, qq{}, xq{}; };

inline Sums rounded_sums(const F8* x, const float* h, F8 inverse, F8 z) {
    Sums s;
    for (long k = 0; k < group4; k++) {
        const F8 q = clamp(nearest(x[k] * inverse + z), 0, 15), hq = h[k] * q;
        s.x += h[k] * x[k];
        s.q += hq;
        s.qq += hq * q;
        s.xq += hq * x[k];
    }
    return s;
}

inline Fit fit4(const F8* x, const float* h) {
    F8 low{}, high{}, xx{};
    float weight = 0;
    for (long k = 0; k < group4; k++) {
        low = smaller(low, x[k]);
        high = larger(high, x[k]);
        xx += h[k] * x[k] * x[k];
        weight += h[k];
    }
    const F8 span = high - low, middle = 0.5f * (high + low);
    Fit best{span / 15.0f, -low};
    F8 best_error = broadcast(3e38f);
    const auto improve = [&](F8 d, F8 z) {
        const Sums s = rounded_sums(x, h, d > 0 ? 1.0f / d : F8{}, z);
        const F8 determinant = weight * s.qq - s.q * s.q;
        F8 step = determinant > 0 ? (weight * s.xq - s.x * s.q) / determinant : d;
        F8 offset = (step * s.q - s.x) / weight;
        const I8 fixed = (offset < 0) | (offset > step * 15.9375f);   // the zero must lie within the codes
        offset = smaller(larger(offset, F8{}), step * 15.9375f);
        step = (fixed & (s.qq > 0)) ? (s.xq + offset * s.q) / s.qq : step;
        const F8 error = xx + step * (step * s.qq - 2.0f * s.xq) + offset * (offset * weight + 2.0f * (s.x - step * s.q));
        const I8 better = (error < best_error) & (step > 0);
        best.d = better ? step : best.d;
        best.m = better ? offset : best.m;
        best_error = better ? error : best_error;
    };
    if (weight > 0)
        for (int i = 0; i < 16; i++) {
            const F8 d = span * ((0.6f + 0.03f * i) / 15.0f);
            improve(d, 7.5f - (d > 0 ? middle / d : F8{}));
        }
    if (weight > 0)
        for (int i = 0; i < 2; i++) improve(best.d, best.d > 0 ? best.m / best.d : F8{});
    return best;
}

inline F8 codes4(F8 x, F8 inverse, F8 z) { return clamp(nearest(x * inverse + z), 0, 15); }

// The stored step (0 to 255, of the row's R) and zero (in sixteenths) with the least error near the fitted ones.
inline void refine4(const F8* x, const float* h, F8 R, const Fit& fit, F8& best_s, F8& best_z) {
    const F8 middle = clamp(R > 0 ? nearest(fit.d / R) : F8{}, 1, 255);
    F8 best_error = broadcast(3e38f);
    for (int ds = -2; ds <= 2; ds++) {
        const F8 s = clamp(middle + static_cast<float>(ds), 1, 255), d = R * s;
        const F8 inverse = d > 0 ? 1.0f / d : F8{}, centre = nearest(16.0f * fit.m * inverse);
        for (int dz = -1; dz <= 1; dz++) {
            const F8 sixteenths = clamp(centre + static_cast<float>(dz), 0, 255), z = sixteenths * 0.0625f;
            F8 error{};
            for (long k = 0; k < group4; k++) {
                const F8 e = x[k] - d * (codes4(x[k], inverse, z) - z);
                error += h[k] * e * e;
            }
            const I8 better = error < best_error;
            best_s = better ? s : best_s;
            best_z = better ? sixteenths : best_z;
            best_error = better ? error : best_error;
        }
    }
}

void pack_i4(const F8* x, const F8& unit, const float* h, long K, long Kp, long lane, uint8_t* out, Fit* fits) {
    const long groups = Kp / group4;
    F8 largest{};
    for (long g = 0; g < groups; g++) {
        fits[g] = fit4(x + g * group4, h + g * group4);
        largest = larger(largest, fits[g].d);
    }
    const F8 R = largest > 1e-30f ? largest / 255.0f : F8{};
    for (long g = 0; g < groups; g++, x += group4, h += group4, out += group4_bytes) {
        F8 s{}, z{};
        refine4(x, h, R, fits[g], s, z);
        const I8 empty = (fits[g].d <= 0) | (R <= 0);
        s = empty ? F8{} : s;
        z = empty ? F8{} : z;
        const F8 d = R * s, inverse = d > 0 ? 1.0f / d : F8{};
        for (long k = 0; k < group4; k++) {
            const F8 code = g * group4 + k < K ? codes4(x[k], inverse, z * 0.0625f) : F8{};
            uint8_t* at = out + k / 8 * 4 * panel + lane * 4 + k % 4;
            for (int n = 0; n < strip; n++) {
                const int value = static_cast<int>(code[n]);
                at[4 * n] = static_cast<uint8_t>(k % 8 < 4 ? value : (at[4 * n] & 15) | value << 4);
            }
        }
        for (int n = 0; n < strip; n++) {
            out[16 * panel + lane + n] = static_cast<uint8_t>(s[n]);
            out[17 * panel + lane + n] = static_cast<uint8_t>(z[n]);
        }
    }
    const F8 stored = R * unit;
    __builtin_memcpy(out + 4 * lane, &stored, sizeof stored);  // `out` is past the last group
}

}  // namespace
}  // namespace roost
