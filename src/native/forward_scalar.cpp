// The model's forward pass for one instruction set; simd.h says why everything is included.
#define ROOST_LANES 4
#include "model.h"
#include "simd.h"
#include "matmul.inl"
#include "forward.inl"

const roost::Kernels roost::kernels_scalar = {forward, product};
