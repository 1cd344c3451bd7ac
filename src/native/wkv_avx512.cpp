// The kernels of WKV for AVX-512: see wkv_body.inl.
#include "wkv.h"

#include <immintrin.h>

#define LANES 16
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)

namespace roost::wkv {
namespace {
#include "wkv_body.inl"
}
const Kernels avx512 = kernels;
}  // namespace roost::wkv
