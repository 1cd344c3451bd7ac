// The kernels of WKV for AVX2 with FMA: see wkv_body.inl.
#include "wkv.h"

#include <immintrin.h>

#define LANES 8

namespace roost::wkv {
namespace {
#include "wkv_body.inl"
}
const Kernels avx2 = kernels;
}  // namespace roost::wkv
