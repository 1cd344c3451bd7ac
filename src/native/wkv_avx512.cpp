// The kernels of WKV for AVX-512: see wkv_body.inl.
#include "wkv.h"

#include <immintrin.h>

#define LANES 16

namespace roost::wkv {
namespace {
#include "wkv_body.inl"
}
const Kernels avx512 = kernels;
}  // namespace roost::wkv
