// The kernels of WKV for AVX2 with FMA: see wkv_body.inl.
#include "wkv.h"

#include <immintrin.h>

#define LANES 8
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)

namespace roost::wkv {
namespace {
#include "wkv_body.inl"
}
const Kernels avx2 = kernels;
}  // namespace roost::wkv
