// The model's forward pass for one instruction set; simd.h says why everything is included.
#define ROOST_LANES 8
#include "model.h"
#include "simd.h"
#include "matmul.inl"
#include "forward.inl"

const roost::Kernels roost::kernels_avx2 = {forward, product};
