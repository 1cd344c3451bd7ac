// The tile instructions in plain vectors, operation for operation after their published pseudo-code, so that the AMX
// paths can be tested on machines without AMX (make test-amx). What faults there ends the process here.
//
// The float instruction rounds to nearest and flushes denormals whatever the thread's mode is; the pool sets that very
// mode (FlushDenormals), so ordinary fused multiply-adds do the same. Included by amx_tiles.h, after simd.h.
#pragma once
#include <cstdlib>

namespace {

struct alignas(64) Tile16 { uint8_t row[16][64]; };
thread_local TileConfig tile_config = {0};   // palette 0: nothing is configured
thread_local Tile16 tile_data[8];

inline void fault_unless(bool good) {
    if (!good) abort();
}

inline void tile_configure(const TileConfig& config) {
    fault_unless(config.palette == 1);
    for (int t = 0; t < 16; t++) {
        const int rows = config.rows[t], bytes = config.bytes[t];
        fault_unless(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (t < 8 || rows == 0));
    }
    for (uint8_t byte : config.reserved) fault_unless(byte == 0);
    tile_config = config;
    memset(tile_data, 0, sizeof tile_data);
}
inline void tile_release() { tile_config = {0}; }

template <int t> inline void tile_zero() {
    fault_unless(tile_config.palette == 1 && tile_config.rows[t] > 0);
    tile_data[t] = {};
}
template <int t> inline void tile_load(const void* at, long stride) {
    tile_zero<t>();                          // rows and bytes beyond the tile's shape become zero
    for (int r = 0; r < tile_config.rows[t]; r++)
        memcpy(tile_data[t].row[r], static_cast<const char*>(at) + r * stride, tile_config.bytes[t]);
}
template <int t> inline void tile_store(void* at, long stride) {
    fault_unless(tile_config.palette == 1 && tile_config.rows[t] > 0);
    for (int r = 0; r < tile_config.rows[t]; r++)
        memcpy(static_cast<char*>(at) + r * stride, tile_data[t].row[r], tile_config.bytes[t]);
}

template <int c, int a, int b> inline void check_shapes() {
    static_assert(c != a && a != b && b != c);
    const TileConfig& x = tile_config;
    fault_unless(x.palette == 1 && x.rows[c] > 0 && x.rows[c] == x.rows[a] && x.bytes[c] == x.bytes[b]
                 && x.bytes[a] == 4 * x.rows[b] && x.bytes[c] % 4 == 0);
}

template <int c, int a, int b> inline void tile_dot_s8_u8() {
    check_shapes<c, a, b>();
    for (int m = 0; m < tile_config.rows[c]; m++) {
        int32_t total[16];
        memcpy(total, tile_data[c].row[m], 64);
        for (int k = 0; k < tile_config.rows[b]; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 4; i++)
                    total[n] += static_cast<int8_t>(tile_data[a].row[m][4 * k + i]) * tile_data[b].row[k][4 * n + i];
        memcpy(tile_data[c].row[m], total, 64);
    }
}

// even and odd inputs are summed apart from zero on, in rising order; then (even + odd) is added to the tile
template <int c, int a, int b> inline void tile_dot_bf16() {
    check_shapes<c, a, b>();
    for (int m = 0; m < tile_config.rows[c]; m++) {
        V even = V{}, odd = V{};
        for (int k = 0; k < tile_config.rows[b]; k++) {
            I pairs;
            uint32_t x;
            memcpy(&pairs, tile_data[b].row[k], sizeof pairs);
            memcpy(&x, tile_data[a].row[m] + 4 * k, sizeof x);
            const I both = I{} + static_cast<int32_t>(x), high = I{} + static_cast<int32_t>(0xffff0000);
            even = fma(as_float(both << 16), as_float(pairs << 16), even);
            odd = fma(as_float(both & high), as_float(pairs & high), odd);
        }
        float* sums = reinterpret_cast<float*>(tile_data[c].row[m]);
        store(sums, load(sums) + (even + odd));
    }
}

}  // namespace
