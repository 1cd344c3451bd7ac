// The model's forward pass with AMX tiles; simd.h says why everything is included.
#define ROOST_LANES 16
#define ROOST_AMX 1
#include "model.h"
#include "simd.h"
#include "matmul.inl"
#include "amx.inl"
#include "forward.inl"

namespace {

void forward_and_release(const Model& m, const Pass& p, const Region& region) {
    forward(m, p, region);
    release_tiles();
}
void product_and_release(const Product& p, const Region& region) {
    product(p, region);
    release_tiles();
}

}  // namespace

const roost::Kernels roost::kernels_amx = {forward_and_release, product_and_release};
