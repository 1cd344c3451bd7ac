// The rounding kernels for the compiler's baseline instruction set.
#include "quantise.inl"

const roost::Quantisers roost::quantisers_scalar = {pack_i8, pack_i4};
