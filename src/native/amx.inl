// Products on AMX tiles: a panel of 32 outputs (two tiles of weights) times up to two tiles of 16 rows.
//
// Integers: a group's sums are the same exact integers that matmul.inl gets, and go through the same float operations
// in the same order, so the bits are those of AVX-512 and tiles serve only where they pay. bf16: the tile instruction
// rounds in an order of its own (32 inputs at a time, even and odd ones apart), so tiles serve every number of rows.
// Each row of a tile is computed by itself: its bits depend neither on the height nor on the other rows. Hence the last
// tile of M rows may overlap the one before, and only M < 16 needs tiles of another height.
//
// Included after matmul.inl.
#include "amx_tiles.h"

namespace {

constexpr long tall = 16;                    // rows of a full tile
enum { C0, C1, C2, C3, A0, A1, B0, B1 };     // C: sums of A0 with B0 and B1, of A1 with B0 and B1

// Of the tiles as this thread has configured them: `rows` of activations, each `bytes` wide. Zero: not configured.
struct TileShape { long rows, bytes; };
thread_local TileShape shaped = {0, 0};

void shape_tiles(long rows, long bytes) {
    if (shaped.rows == rows && shaped.bytes == bytes) return;
    TileConfig config;
    for (int t = C0; t <= B1; t++) {
        config.rows[t] = static_cast<uint8_t>(t >= B0 ? bytes / 4 : rows);
        config.bytes[t] = static_cast<uint16_t>(t == A0 || t == A1 ? bytes : 64);
    }
    tile_configure(config);
    shaped = {rows, bytes};
}
// Before a thread goes on to other things: tiles in use are kept through every switch of threads, 8 KiB at a time.
void release_tiles() {
    if (shaped.rows) tile_release();
    shaped = {0, 0};
}

inline long height(long M) { return M < tall ? M : tall; }
inline long start(long i, long M) { return i * tall + tall <= M ? i * tall : M - height(M); }   // first row of tile i

// ---- bf16

// C += 32 inputs of one or two tiles of rows times the panel's 32 pairs of weights at w
template <int count> inline void step_bf16(const uint8_t* w, const uint16_t* x, const uint16_t* y, long K) {
    tile_load<B0>(w, 4 * panel), tile_load<B1>(w + 64, 4 * panel);
    tile_load<A0>(x, 2 * K);
    tile_dot_bf16<C0, A0, B0>(), tile_dot_bf16<C1, A0, B1>();
    if constexpr (count == 2) {
        tile_load<A1>(y, 2 * K);
        tile_dot_bf16<C2, A1, B0>(), tile_dot_bf16<C3, A1, B1>();
    }
}

template <int count> void rows_bf16(const uint8_t* p, const Activations& a, long first, long second, float* out) {
    const uint16_t* values = static_cast<const uint16_t*>(a.values);
    const uint16_t *x = values + first * a.K, *y = values + second * a.K;
    tile_zero<C0>(), tile_zero<C1>(), tile_zero<C2>(), tile_zero<C3>();
    for (long k = 0; k < a.K; k += 32) step_bf16<count>(p + 2 * k * panel, x + k, y + k, a.K);
    tile_store<C0>(out + first * unit, 4 * unit), tile_store<C1>(out + first * unit + 16, 4 * unit);
    if constexpr (count == 2)
        tile_store<C2>(out + second * unit, 4 * unit), tile_store<C3>(out + second * unit + 16, 4 * unit);
}

// One row of which most inputs are zero. Only weights of pairs that hold something are read, into a copy of the group;
// what an earlier group left in the others' place is multiplied by zero.
void sparse_row_bf16(const uint8_t* p, const Activations& a, float* out) {
    alignas(64) uint8_t group[2 * unit * panel] = {};
    const uint16_t* x = static_cast<const uint16_t*>(a.values);
    tile_zero<C0>(), tile_zero<C1>();
    for (long g = 0; g < a.K / unit; g++) {
        if (a.starts[g] == a.starts[g + 1]) continue;
        for (int32_t i = a.starts[g]; i < a.starts[g + 1]; i++) {
            const long pair = a.nonzero[i];
            memcpy(group + pair % 32 * 4 * panel, p + pair * 4 * panel, 4 * panel);
        }
        for (long k = 0; k < unit; k += 32) step_bf16<1>(group + 2 * k * panel, x + g * unit + k, nullptr, a.K);
    }
    tile_store<C0>(out, 4 * unit), tile_store<C1>(out + 16, 4 * unit);
}

// ---- integers

struct alignas(64) Sums { int32_t of[2][tall][panel]; };

// the sums of one group: x and y are rows of signed bytes, w quads of codes
template <int count> inline void sum_group(const uint8_t* w, const int8_t* x, const int8_t* y, long K, Sums& sums) {
    tile_load<B0>(w, 4 * panel), tile_load<B1>(w + 64, 4 * panel);
    tile_load<A0>(x, K);
    tile_zero<C0>(), tile_zero<C1>();
    tile_dot_s8_u8<C0, A0, B0>(), tile_dot_s8_u8<C1, A0, B1>();
    if constexpr (count == 2) {
        tile_load<A1>(y, K);
        tile_zero<C2>(), tile_zero<C3>();
        tile_dot_s8_u8<C2, A1, B0>(), tile_dot_s8_u8<C3, A1, B1>();
    }
    tile_store<C0>(sums.of[0], 4 * panel), tile_store<C1>(sums.of[0][0] + 16, 4 * panel);
    if constexpr (count == 2) tile_store<C2>(sums.of[1], 4 * panel), tile_store<C3>(sums.of[1][0] + 16, 4 * panel);
}

inline I integers(const int32_t* at) {
    I x;
    memcpy(&x, at, sizeof x);
    return x;
}

struct Int8 {
    static constexpr long group = unit, bytes = 33 * unit;
    const V scale[vectors];
    explicit Int8(const uint8_t* p) : scale{widen(p + 32 * unit), widen(p + 32 * unit + 2 * lanes)} {}
    static const uint8_t* codes(const uint8_t* p, uint8_t*) { return p; }
    V add(V acc, I total, const Activations& a, long row, long g, int j) const {
        const int32_t* sums = a.sum + (row * a.K + g * unit) / 32;
        return fma(to_float(total - 128 * (sums[0] + sums[1])), scale[j] * a.scale[row * (a.K / unit) + g], acc);
    }
};

struct Int4 {
    static constexpr long group = 32, bytes = 18 * 32;
    const V s[vectors], z[vectors];
    explicit Int4(const uint8_t* p)
        : s{bytes_to_float(p + 512), bytes_to_float(p + 512 + lanes)},
          z{bytes_to_float(p + 544) * 0.0625f, bytes_to_float(p + 544 + lanes) * 0.0625f} {}
    static const uint8_t* codes(const uint8_t* p, uint8_t* room) {     // octets of nibbles -> quads of bytes
        const __m512i mask = _mm512_set1_epi8(15);
        for (int i = 0; i < 8; i++, p += 64) {
            const __m512i both = _mm512_loadu_si512(p);
            uint8_t* to = room + i / 2 * 8 * panel + i % 2 * 64;
            _mm512_storeu_si512(to, _mm512_and_si512(both, mask));
            _mm512_storeu_si512(to + 4 * panel, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
        }
        return room;
    }
    V add(V acc, I total, const Activations& a, long row, long g, int j) const {
        const long at = row * (a.K / 32) + g;
        return fma(to_float(total) - z[j] * static_cast<float>(a.sum[at]), s[j] * a.scale[at / 2], acc);
    }
};

// Tiles of rows that begin at first and second; fine: one tile of rows, its high and its low bytes. While the vector
// units turn a group's sums into floats, the tiles are at the next group.
template <class Code, int count, bool fine>
void rows_integer(const uint8_t* p, const Activations& a, long first, long second, long M, float* out) {
    constexpr int used = fine ? 2 : count;
    const long groups = a.K / Code::group, rows = height(M), begin[] = {first, second};
    const int8_t *values = static_cast<const int8_t*>(a.values), *x = values + first * a.K,
                 *y = fine ? a.low + first * a.K : values + second * a.K;
    alignas(64) float acc[count][tall][panel] = {};
    alignas(64) uint8_t room[4 * 8 * panel];
    Sums sums[2];
    const auto sum = [&](long g) {
        const uint8_t* w = Code::codes(p + g * Code::bytes, room);
        sum_group<used>(w, x + g * Code::group, y + g * Code::group, a.K, sums[g % 2]);
    };
    sum(0);
    for (long g = 0; g < groups; g++) {
        if (g + 1 < groups) sum(g + 1);
        const Code code(p + g * Code::bytes);
        const auto& now = sums[g % 2].of;
        for (int i = 0; i < count; i++)
            for (long r = 0; r < rows; r++)
                for (int j = 0; j < vectors; j++) {
                    I total = integers(now[i][r] + j * lanes);
                    if (fine) total = total * 256 + integers(now[1][r] + j * lanes);
                    float* to = acc[i][r] + j * lanes;
                    store(to, code.add(load(to), total, a, begin[i] + r, g, j));
                }
    }
    for (int i = 0; i < count; i++)
        for (long r = 0; r < rows; r++)
            for (int j = 0; j < vectors; j++) {
                V y = load(acc[i][r] + j * lanes);
                if (Code::group == 32) y *= load(reinterpret_cast<const float*>(p + groups * Code::bytes) + j * lanes);
                store(out + (begin[i] + r) * unit + j * lanes, y);
            }
}

// ---- a panel

inline bool tiles_pay(Format f, long M) {
    switch (f) {
        case Format::bf16: return true;
        case Format::i8: case Format::i8_fine: return M >= 4;
        case Format::i4: return M >= 8;
        default: return false;
    }
}

template <Format f, int count>
inline void tile_rows(const uint8_t* p, const Activations& a, long first, long second, long M, float* out) {
    if constexpr (f == Format::bf16) rows_bf16<count>(p, a, first, second, out);
    else if constexpr (f == Format::i4) rows_integer<Int4, count, false>(p, a, first, second, M, out);
    else rows_integer<Int8, count, f == Format::i8_fine>(p, a, first, second, M, out);
}

template <Format f> void tile_panel(const uint8_t* p, const Activations& a, long M, float* out) {
    shape_tiles(height(M), f == Format::i4 ? 32 : 64);
    if (f == Format::bf16 && a.nonzero && M == 1) return sparse_row_bf16(p, a, out);
    const long tiles = (M + tall - 1) / tall;
    long i = 0;
    if constexpr (f != Format::i8_fine)      // which has no tiles left for more rows
        for (; i + 2 <= tiles; i += 2) tile_rows<f, 2>(p, a, start(i, M), start(i + 1, M), M, out);
    for (; i < tiles; i++) tile_rows<f, 1>(p, a, start(i, M), start(i, M), M, out);
}

// outputs [c, c + 64) of W for all rows
inline void multiply(const Matrix& W, long c, const Activations& a, long M, float* out) {
    for (long p = c / panel; p < W.panels() && p < (c + unit) / panel && M > 0; p++) {
        float* to = out + p * panel - c;
        if (!tiles_pay(W.format, M)) multiply_panel(W, p, a, M, to);
        else if (W.format == Format::bf16) tile_panel<Format::bf16>(W.at(p), a, M, to);
        else if (W.format == Format::i8) tile_panel<Format::i8>(W.at(p), a, M, to);
        else if (W.format == Format::i8_fine) tile_panel<Format::i8_fine>(W.at(p), a, M, to);
        else tile_panel<Format::i4>(W.at(p), a, M, to);
    }
}

}  // namespace
