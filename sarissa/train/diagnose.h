// Where a training run first went wrong.
#pragma once

#include <string>

#include "sarissa/model/decoder.h"
#include "sarissa/train/loss.h"

namespace sarissa::train {

/// The first part of the model whose output on this batch has a non-finite element: "blocks.N",
/// "head" when only the loss is not finite, "" when all is well. Bisects with copies of the model's
/// first blocks: takes the memory of a second model and a few forward passes.
std::string first_non_finite_output(const model::Decoder& decoder, const DeviceBatch& batch);

}  // namespace sarissa::train
