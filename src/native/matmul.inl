// Products with packed matrices: a panel of 32 outputs times R rows at a time. One accumulator per output and row,
// inputs in rising order. Of integers the sum of a group (64 inputs, int4: 32) is exact, and the groups are added as
// floats in rising order. So the bits of a row do not depend on R, on the other rows, or on who computes the panel.
//
// Included after simd.h, once per instruction set.

namespace {
using namespace roost;

constexpr int vectors = panel / lanes;       // per panel
inline float bf16_to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline V to_float(I x) { return __builtin_convertvector(x, V); }
inline V widen(const uint8_t* bf16) {        // as many bf16 as there are lanes
#if ROOST_LANES == 16                        // (the masked form: GCC 12 warns about the plain one)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
    return as_float((I)_mm512_maskz_cvtepu16_epi32(0xffff, half) << 16);
#elif ROOST_LANES == 8
    return as_float((I)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16))) << 16);
#else
    uint16_t half[lanes];
    memcpy(half, bf16, sizeof half);
    return V{bf16_to_float(half[0]), bf16_to_float(half[1]), bf16_to_float(half[2]), bf16_to_float(half[3])};
#endif
}
inline V bytes_to_float(const uint8_t* at) { // as many bytes as there are lanes
#if ROOST_LANES == 16
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return to_float((I)_mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif ROOST_LANES == 8
    return to_float((I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
    return to_float(I{at[0], at[1], at[2], at[3]});
#endif
}

// ---- activations

// columns [c, c + 64) of one row, zero beyond `end`, in the form the matrix wants. y holds the values from column c on.
inline void prepare(const Activations& a, long row, long c, const float* y, long count) {
    alignas(64) float x[unit] = {};
    memcpy(x, y, sizeof(float) * static_cast<size_t>(count < unit ? count : unit));
    const long at = row * a.K + c;
    if (a.kind == Inputs::f32) {
        memcpy(static_cast<float*>(a.values) + at, x, sizeof x);
        return;
    }
    if (a.kind == Inputs::bf16) {
        uint16_t* out = static_cast<uint16_t*>(a.values) + at;
        for (long i = 0; i < unit; i++) out[i] = float_to_bf16(x[i]);
        return;
    }
    V most = V{}, odd = V{};                  // odd: 0, or NaN where a number is not finite
    for (long i = 0; i < unit; i += lanes) most = maximum(most, absolute(load(x + i))), odd += load(x + i) - load(x + i);
    float peak = 0, wrong = 0;
    for (int i = 0; i < lanes; i++) peak = most[i] > peak ? most[i] : peak, wrong += odd[i];
    if (wrong != 0) {                         // the scale NaN, for all outputs; no code zero, lest find_nonzero skip it
        for (float& one : x) one = 1.f;
        peak = 1.f;
    }
    const float full = a.kind == Inputs::s8 ? 127.f : 32512.f;   // 127 * 256: the high byte stays within +-127
    const float inverse = peak > 1e-33f ? full / peak : 0.f;     // below, it would be infinite or the scale denormal
    a.scale[row * (a.K / unit) + c / unit] = peak / full + wrong;
    alignas(64) int32_t q[unit];
    for (long i = 0; i < unit; i += lanes) {
        const I rounded = round_to_int(load(x + i) * inverse);
        memcpy(q + i, &rounded, sizeof rounded);
    }
    for (long half = 0; half < 2; half++) {
        int32_t total = 0;
        for (long i = 0; i < 32; i++) total += q[32 * half + i];
        a.sum[(row * a.K + c) / 32 + half] = total;
    }
#if ROOST_LANES == 16
    int8_t* high = static_cast<int8_t*>(a.values) + at;
    if (a.kind == Inputs::s8)
        for (long i = 0; i < unit; i++) high[i] = static_cast<int8_t>(q[i]);
    else
        for (long i = 0; i < unit; i++) {
            const int32_t top = (q[i] + 128) >> 8;
            high[i] = static_cast<int8_t>(top);
            a.low[at + i] = static_cast<int8_t>(q[i] - 256 * top);
        }
#else
    int16_t* out = static_cast<int16_t*>(a.values) + at;     // of four inputs the order 0 2 1 3: see `quads`
    for (long i = 0; i < unit; i += 4)
        out[i] = static_cast<int16_t>(q[i]), out[i + 1] = static_cast<int16_t>(q[i + 2]),
        out[i + 2] = static_cast<int16_t>(q[i + 1]), out[i + 3] = static_cast<int16_t>(q[i + 3]);
#endif
}

// ---- which inputs are multiplied

// Squared ReLU leaves exact zeros. A block is what one step of a product takes: an input (f32, w16), a pair (bf16), four
// (i8) or eight (i4). With `nonzero`, only blocks that hold something are read: the others would add zero, exactly.
inline long block_bytes(Format f) { return f == Format::i4 ? 8 * sizeof(int16_t) / (lanes == 16 ? 2 : 1)
                                           : f >= Format::i8 ? 4 * sizeof(int16_t) / (lanes == 16 ? 2 : 1) : 4; }

inline bool is_zero(const void* block, long bytes) {
    int64_t words[2] = {};
    memcpy(words, block, static_cast<size_t>(bytes));
    return (words[0] | words[1]) == 0;
}

// the blocks of row 0 that are not zero, and where each group of 64 (i4: 32) inputs begins among them
inline void find_nonzero(Activations& a, Format f, int32_t* list, int32_t* starts) {
    const long bytes = block_bytes(f), size = a.kind == Inputs::f32 ? 4 : a.kind == Inputs::bf16 || lanes < 16 ? 2 : 1;
    const long inputs = bytes / size, group = f == Format::i4 ? 32 : unit;
    const int8_t* low = f == Format::i8_fine && lanes == 16 ? a.low : nullptr;   // `values` is only the high bytes
    int32_t count = 0;
    for (long k = 0; k < a.K; k += inputs) {
        if (k % group == 0) starts[k / group] = count;
        list[count] = static_cast<int32_t>(k / inputs);
        count += !is_zero(static_cast<const char*>(a.values) + k * size, bytes) || (low && !is_zero(low + k, bytes));
    }
    starts[a.K / group] = count;
    if (3 * count < 2 * (a.K / inputs)) a.nonzero = list, a.starts = starts;   // a quarter less, in jumps, is slower
}

// step(block) for the blocks of groups [g, end), counted from block `first`: all `count` of them, or those not zero
template <bool sparse, class F> inline void walk(const Activations& a, long g, long end, long first, long count, F&& step) {
    if constexpr (sparse)
        for (int32_t i = a.starts[g]; i < a.starts[end]; i++) step(a.nonzero[i] - first);
    else
        for (long k = 0; k < count; k++) step(k);
}

// ---- float products

struct LoadF32 {
    static V get(const uint8_t* p, long k, int j) { return load(reinterpret_cast<const float*>(p) + k * panel + j * lanes); }
};
struct LoadW16 {
    static V get(const uint8_t* p, long k, int j) { return widen(p + 2 * (k * panel + j * lanes)); }
};

template <int R> inline void finish(const V (&acc)[R][vectors], float* out) {
    for (int r = 0; r < R; r++)
        for (int j = 0; j < vectors; j++) store(out + r * unit + j * lanes, acc[r][j]);
}

template <int R, bool sparse, class Load>
inline void tile_float(const uint8_t* p, const Activations& a, long row, long K, float* out) {
    V acc[R][vectors] = {};
    const float* x = static_cast<const float*>(a.values) + row * a.K;
    walk<sparse>(a, 0, a.K / unit, 0, K, [&](long k) {
        V w[vectors];
        for (int j = 0; j < vectors; j++) w[j] = Load::get(p, k, j);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < vectors; j++) acc[r][j] = fma(w[j], splat(x[r * a.K + k]), acc[r][j]);
    });
    finish<R>(acc, out);
}

// a 32-bit word holds inputs 2k (low half) and 2k + 1 of one output
template <int R, bool sparse> inline void tile_bf16(const uint8_t* p, const Activations& a, long row, float* out) {
    V acc[R][vectors] = {};
    const uint16_t* x = static_cast<const uint16_t*>(a.values) + row * a.K;
    walk<sparse>(a, 0, a.K / unit, 0, a.K / 2, [&](long k) {
        for (int j = 0; j < vectors; j++) {
            const uint8_t* at = p + 4 * (k * panel + j * lanes);
#if ROOST_LANES == 16
            const __m512bh w = (__m512bh)_mm512_loadu_si512(at);
            for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, x + r * a.K + 2 * k, 4);
                acc[r][j] = _mm512_dpbf16_ps(acc[r][j], w, (__m512bh)_mm512_set1_epi32(pair));
            }
#else
            I pairs;
            memcpy(&pairs, at, sizeof pairs);
            const V even = as_float(pairs << 16), odd = as_float(pairs & static_cast<int32_t>(0xffff0000));
            for (int r = 0; r < R; r++) {
                const uint16_t* pair = x + r * a.K + 2 * k;
                acc[r][j] = fma(even, splat(bf16_to_float(pair[0])), acc[r][j]);
                acc[r][j] = fma(odd, splat(bf16_to_float(pair[1])), acc[r][j]);
            }
#endif
        }
    });
    finish<R>(acc, out);
}

// ---- integer products: unsigned codes of weights times signed activations, sums exact in 32 bits

#if ROOST_LANES == 16
inline __m512i four(const int8_t* at) {
    int32_t word;
    memcpy(&word, at, 4);
    return _mm512_set1_epi32(word);
}
#else
// acc[n] += sum over four inputs of w[4 n + b] * a[b]; activations come as pairs (a0, a2), (a1, a3) of 16-bit integers
inline void quads(I* acc, const uint8_t* w, const int16_t* a) {
    for (int j = 0; j < vectors; j++) {
#if ROOST_LANES == 8
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + 32 * j));
        int32_t even, odd;
        memcpy(&even, a, 4), memcpy(&odd, a + 2, 4);
        const __m256i low = _mm256_madd_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_set1_epi32(even));
        const __m256i high = _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), _mm256_set1_epi32(odd));
        acc[j] += (I)_mm256_add_epi32(low, high);
#else
        for (int i = 0; i < lanes; i++) {
            const uint8_t* four = w + 4 * (lanes * j + i);
            acc[j][i] += four[0] * a[0] + four[1] * a[2] + four[2] * a[1] + four[3] * a[3];
        }
#endif
    }
}
#endif

template <int R, bool sparse, bool fine> inline void tile_i8(const uint8_t* p, const Activations& a, long row, float* out) {
    V acc[R][vectors] = {};
    const long groups = a.K / unit;
    for (long g = 0; g < groups; g++, p += 33 * unit) {
        if (sparse && a.starts[g] == a.starts[g + 1]) continue;
        I dot[R][vectors], low[fine ? R : 1][vectors] = {};
        for (int r = 0; r < R; r++) {
            const int32_t* sums = a.sum + ((row + r) * a.K + g * unit) / 32;
            const int32_t offset = -128 * (sums[0] + sums[1]);           // codes are weights + 128
            for (int j = 0; j < vectors; j++)
                if (fine && lanes == 16) low[r][j] = I{} + offset, dot[r][j] = I{};
                else dot[r][j] = I{} + offset;
        }
        walk<sparse>(a, g, g + 1, 16 * g, 16, [&](long q) {
            const uint8_t* w = p + q * 4 * panel;
#if ROOST_LANES == 16
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            for (int r = 0; r < R; r++) {
                const long at = (row + r) * a.K + g * unit + 4 * q;
                const __m512i x = four(static_cast<const int8_t*>(a.values) + at);
                dot[r][0] = (I)_mm512_dpbusd_epi32((__m512i)dot[r][0], w0, x);
                dot[r][1] = (I)_mm512_dpbusd_epi32((__m512i)dot[r][1], w1, x);
                if constexpr (fine) {
                    const __m512i y = four(a.low + at);
                    low[r][0] = (I)_mm512_dpbusd_epi32((__m512i)low[r][0], w0, y);
                    low[r][1] = (I)_mm512_dpbusd_epi32((__m512i)low[r][1], w1, y);
                }
            }
#else
            for (int r = 0; r < R; r++)
                quads(dot[r], w, static_cast<const int16_t*>(a.values) + (row + r) * a.K + g * unit + 4 * q);
#endif
        });
        for (int j = 0; j < vectors; j++) {
            const V scale = widen(p + 32 * unit + 2 * j * lanes);
            for (int r = 0; r < R; r++) {
                I total = dot[r][j];
                if (fine && lanes == 16) total = total * 256 + low[r][j];
                acc[r][j] = fma(to_float(total), scale * a.scale[(row + r) * groups + g], acc[r][j]);
            }
        }
    }
    finish<R>(acc, out);
}

template <int R, bool sparse> inline void tile_i4(const uint8_t* p, const Activations& a, long row, float* out) {
    V acc[R][vectors] = {};
    const long groups = a.K / 32;
    for (long g = 0; g < groups; g++, p += 18 * 32) {
        if (sparse && a.starts[g] == a.starts[g + 1]) continue;
        I dot[R][vectors] = {};
        walk<sparse>(a, g, g + 1, 4 * g, 4, [&](long o) {
            const uint8_t* w = p + o * 4 * panel;
#if ROOST_LANES == 16
            const __m512i mask = _mm512_set1_epi8(15);
            __m512i low[2], high[2];
            for (int j = 0; j < 2; j++) {
                const __m512i codes = _mm512_loadu_si512(w + 64 * j);
                low[j] = _mm512_and_si512(codes, mask), high[j] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
            }
            for (int r = 0; r < R; r++) {
                const int8_t* x = static_cast<const int8_t*>(a.values) + (row + r) * a.K + g * 32 + 8 * o;
                for (int j = 0; j < 2; j++) {
                    const __m512i first = _mm512_dpbusd_epi32((__m512i)dot[r][j], low[j], four(x));
                    dot[r][j] = (I)_mm512_dpbusd_epi32(first, high[j], four(x + 4));
                }
            }
#else
            uint8_t low[4 * panel], high[4 * panel];
            for (int i = 0; i < 4 * panel; i++) low[i] = w[i] & 15, high[i] = w[i] >> 4;
            for (int r = 0; r < R; r++) {
                const int16_t* x = static_cast<const int16_t*>(a.values) + (row + r) * a.K + g * 32 + 8 * o;
                quads(dot[r], low, x), quads(dot[r], high, x + 4);
            }
#endif
        });
        for (int j = 0; j < vectors; j++) {
            const V s = bytes_to_float(p + 512 + j * lanes), z = bytes_to_float(p + 544 + j * lanes) * 0.0625f;
            for (int r = 0; r < R; r++) {    // both terms of the difference are exact: below 2^24 in sixteenths
                const V shifted = to_float(dot[r][j]) - z * static_cast<float>(a.sum[(row + r) * groups + g]);
                acc[r][j] = fma(shifted, s * a.scale[((row + r) * groups + g) / 2], acc[r][j]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < vectors; j++)
            store(out + r * unit + j * lanes, acc[r][j] * load(reinterpret_cast<const float*>(p) + j * lanes));
}

template <int R, bool sparse>
inline void tile(const Matrix& W, const uint8_t* p, const Activations& a, long row, float* out) {
    switch (W.format) {
        case Format::f32: return tile_float<R, sparse, LoadF32>(p, a, row, W.K, out);
        case Format::w16: return tile_float<R, sparse, LoadW16>(p, a, row, W.K, out);
        case Format::bf16: return tile_bf16<R, sparse>(p, a, row, out);
        case Format::i8: return tile_i8<R, sparse, false>(p, a, row, out);
        case Format::i8_fine: return tile_i8<R, sparse, true>(p, a, row, out);
        case Format::i4: return tile_i4<R, sparse>(p, a, row, out);
    }
}

using Tile = void (*)(const Matrix&, const uint8_t*, const Activations&, long, float*);
constexpr Tile tiles[] = {
    tile<1, false>,
#if ROOST_LANES >= 8
    tile<2, false>, tile<3, false>,
#endif
#if ROOST_LANES == 16
    tile<4, false>, tile<5, false>, tile<6, false>,
#endif
};
constexpr long tallest = sizeof tiles / sizeof *tiles;       // rows at a time: what the registers hold

// out[m * 64 + 0..31] = panel p of W times rows [0, M), in tiles of nearly equal height; a row of `out` is 64 wide
inline void multiply_panel(const Matrix& W, long p, const Activations& a, long M, float* out) {
    if (a.nonzero && M == 1) return tile<1, true>(W, W.at(p), a, 0, out);
    const long most = W.format == Format::i8_fine && tallest > 4 ? 4 : tallest;
    for (long m = 0; m < M;) {
        const long left = M - m, height = (left + (left + most - 1) / most - 1) / ((left + most - 1) / most);
        tiles[height - 1](W, W.at(p), a, m, out + m * unit);
        m += height;
    }
}

#if !ROOST_AMX                               // amx.inl has its own
// outputs [c, c + 64) of W for all rows
inline void multiply(const Matrix& W, long c, const Activations& a, long M, float* out) {
    for (long p = c / panel; p < W.panels() && p < (c + unit) / panel; p++)
        multiply_panel(W, p, a, M, out + p * panel - c);
}
#endif

}  // namespace
