// The tile instructions of AMX, and nothing else: eight tiles of at most 16 rows of 64 bytes, tile numbers as template
// parameters. Inline assembly rather than intrinsics: those of GCC before 13.2 do not say that loads and the
// configuration read memory, so the stores that filled it may be left out.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) TileConfig {              // what LDTILECFG reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};                 // of a row of each tile
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

#if ROOST_AMX_EMULATED
#include "amx_emulated.h"
#else
namespace {

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int t> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> inline void tile_load(const void* at, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(t) : "memory");
}
template <int t> inline void tile_store(void* at, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(t) : "memory");
}
// c[m][n] += sum over k of a[m][k] b[k][n]: a row of b holds, for each of 16 outputs, four bytes or two bf16
template <int c, int a, int b> inline void tile_dot_s8_u8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b> inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
#endif
