// Packed weights: the layouts that the matrix kernels read, and how numbers are rounded into them.
// Byte by byte the layouts are in docs/native.md, "Packed matrices".
//
// Eight outputs (a strip) are quantised at a time, one per vector lane, so every output's bytes depend on its own row
// alone: neither threads nor instruction sets change them.
#include "common.h"
#include "pack.h"
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

namespace roost {
namespace {

struct Input { F8 outputs; };                         // std::vector needs a struct to keep the alignment

struct Shape {
    Format format;
    long N, K, panels, Kp, bytes;                     // Kp inputs and `bytes` bytes in a panel
    Shape(int id, long N, long K) : format(static_cast<Format>(id)), N(N), K(K) {
        constexpr long most = 1l << 31;
        if (id < 0 || id > 5) throw Error("format " + std::to_string(id) + " is unknown; 0 to 5 are known");
        if (N < 1 || K < 1 || N > most || K > most || N > (1l << 46) / K)
            throw Error("a matrix of " + std::to_string(N) + " x " + std::to_string(K) + " cannot be packed");
        panels = (N + panel - 1) / panel;
        bytes = panel_bytes(format, K);
        Kp = format == Format::f32 ? bytes / 128 : format == Format::w16 ? bytes / 64 : round_up(K, unit);
    }
    bool integer() const { return format >= Format::i8; }
    float largest() const {                           // the last number before those that bf16 rounds to infinity
        return format == Format::w16 || format == Format::bf16 ? 0x1.fefffep127f : FLT_MAX;
    }
};

// Eight rows from `first` on, input by input, zeros beyond N and K. For integers every row is divided by a power of two,
// its `unit`, so that squares of its numbers neither overflow nor vanish. False when a number would not be finite.
bool load_strip(const float* w, const Shape& shape, long first, F8* x, F8& unit) {
    const long rows = std::min(strip, shape.N - first);
    std::memset(x, 0, sizeof(F8) * shape.Kp);
    unit = F8{} + 1.0f;
    const float largest = shape.largest();
    bool finite = true;
    for (long n = 0; n < rows; n++) {
        const float* row = w + (first + n) * shape.K;
        float most = 0;
        for (long k = 0; k < shape.K; k++) {
            x[k][n] = row[k];
            most = std::max(most, std::abs(row[k]));
            finite &= std::abs(row[k]) <= largest;
        }
        if (!shape.integer()) continue;
        unit[n] = std::ldexp(1.0f, std::clamp(std::ilogb(std::max(most, FLT_MIN)), -100, 100));
        for (long k = 0; k < shape.K; k++) x[k][n] *= 1.0f / unit[n];
    }
    return finite;
}

void pack_float(const F8* x, const Shape& shape, long lane, uint8_t* out) {
    for (long k = 0; k < shape.Kp; k++)
        for (int n = 0; n < strip; n++) {
            const float value = x[k][n];
            const uint16_t half = to_bf16(value);
            if (shape.format == Format::f32) std::memcpy(out + 4 * (k * panel + lane + n), &value, 4);
            else if (shape.format == Format::w16) std::memcpy(out + 2 * (k * panel + lane + n), &half, 2);
            else std::memcpy(out + 2 * ((k / 2 * panel + lane + n) * 2 + k % 2), &half, 2);
        }
}

const Quantisers& quantisers() {
#if defined(__x86_64__)
    if (isa() >= Isa::avx2) return quantisers_avx2;
#endif
    return quantisers_scalar;
}

void pack(const Shape& shape, const float* w, uint8_t* out, int threads) {
    if (threads < 1 || threads > max_threads) throw Error("threads is " + std::to_string(threads) + "; it must be 1 to 256");
    std::vector<Input> strips(shape.Kp * threads);
    std::vector<Fit> fits(shape.format == Format::i4 ? shape.Kp / group4 * threads : 0);
    std::vector<float> h(shape.Kp, 0.0f);    // the inputs that count: not the padding
    std::fill_n(h.begin(), shape.K, 1.0f);
    const Quantisers& kernels = quantisers();
    std::atomic<bool> finite{true};
    parallel(threads, [&](const Region& region) {
        long first, last;
        region.slice(shape.panels, 1, first, last);
        F8* x = &strips[shape.Kp * region.thread].outputs;
        Fit* fit = fits.data() + (shape.format == Format::i4 ? shape.Kp / group4 * region.thread : 0);
        for (long p = first; p < last; p++)
            for (long lane = 0; lane < panel; lane += strip) {
                uint8_t* to = out + p * shape.bytes;
                F8 unit;
                if (!load_strip(w, shape, p * panel + lane, x, unit)) finite = false;
                if (!shape.integer()) pack_float(x, shape, lane, to);
                else if (shape.format == Format::i4) kernels.i4(x, unit, h.data(), shape.K, shape.Kp, lane, to, fit);
                else kernels.i8(x, unit, h.data(), shape.Kp, lane, to);
            }
    });
    if (!finite)  // skipping an input that is zero (find_nonzero) would turn 0 * infinity, which is NaN, into 0
        throw Error(shape.largest() < FLT_MAX ? "the matrix holds NaN, infinity or a number too large for bf16"
                                              : "the matrix holds NaN or infinity");
}

float element(const Shape& shape, const uint8_t* in, long n, long k) {
    const auto half = [&](const uint8_t* at) {
        uint16_t x;
        std::memcpy(&x, at, 2);
        return from_bf16(x);
    };
    const auto single = [&](const uint8_t* at) {
        float x;
        std::memcpy(&x, at, 4);
        return x;
    };
    switch (shape.format) {
        case Format::f32: return single(in + 4 * (k * panel + n));
        case Format::w16: return half(in + 2 * (k * panel + n));
        case Format::bf16: return half(in + 2 * ((k / 2 * panel + n) * 2 + k % 2));
        case Format::i4: {
            const uint8_t *group = in + k / group4 * group4_bytes, *rows = in + shape.Kp / group4 * group4_bytes;
            const uint8_t byte = group[k % group4 / 8 * 4 * panel + 4 * n + k % 4];
            const int code = k % 8 < 4 ? byte & 15 : byte >> 4;
            const float s = group[16 * panel + n], z = group[17 * panel + n];
            return single(rows + 4 * n) * s * (static_cast<float>(code) - z * 0.0625f);
        }
        default: {
            const uint8_t* group = in + k / group8 * group8_bytes;
            const int code = group[k % group8 / 4 * 4 * panel + 4 * n + k % 4];
            return static_cast<float>(code - 128) * half(group + group8 * panel + 2 * n);
        }
    }
}

}  // namespace
}  // namespace roost

// Bytes of a packed matrix, or -1.
ROOST_API long roost_packed_size(int format, long N, long K) {
    long bytes = -1;
    roost::guarded([&] {
        const roost::Shape shape(format, N, K);
        bytes = shape.panels * shape.bytes;
    });
    return bytes;
}

// w (N, K) fp32, rows after one another -> out.
ROOST_API int roost_pack(int format, const float* w, long N, long K, void* out, int threads) {
    return roost::guarded([&] { roost::pack(roost::Shape(format, N, K), w, static_cast<uint8_t*>(out), threads); });
}

// What the packed numbers mean: w (N, K) fp32.
ROOST_API int roost_unpack(int format, const void* packed, long N, long K, float* w, int threads) {
    return roost::guarded([&] {
        const roost::Shape shape(format, N, K);
        roost::parallel(threads, [&](const roost::Region& region) {
            long first, last;
            region.slice(N, roost::panel, first, last);
            for (long n = first; n < last; n++) {
                const uint8_t* in = static_cast<const uint8_t*>(packed) + n / roost::panel * shape.bytes;
                for (long k = 0; k < K; k++) w[n * K + k] = roost::element(shape, in, n % roost::panel, k);
            }
        });
    });
}
