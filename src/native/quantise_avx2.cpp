// The rounding kernels for AVX2.
#include "quantise.inl"

const roost::Quantisers roost::quantisers_avx2 = {pack_i8, pack_i4};
