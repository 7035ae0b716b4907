// Keys or values of past steps, [B, S, Hkv, P], growing along S at amortised cost.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace sarissa::model {

/// Appends `fresh` [B, L, Hkv, P]. The cache is a view of a buffer with room for later steps; a
/// full buffer is replaced by one of twice the size. The room is used only while nothing else
/// refers to the memory, so a copied handle never sees it change. Where gradients flow the two are
/// concatenated.
void append_steps(at::Tensor& cache_BSHP, const at::Tensor& fresh_BLHP);

/// Drops all but the last `steps`, and gives memory back when most of the buffer is unused.
void keep_last_steps(at::Tensor& cache_BSHP, int64_t steps);

}  // namespace sarissa::model
