// The training loss: the sum of the tokens' weighted negative log-likelihoods.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "sarissa/data/batches.h"
#include "sarissa/model/decoder.h"

namespace sarissa::train {

/// Rows of a batch as tensors on a device.
struct DeviceBatch {
  at::Tensor inputs_BL;   // int64
  at::Tensor targets_BL;  // int64
  at::Tensor weights_BL;  // fp32
};

/// Rows [first_row, first_row + rows) of `batch`.
DeviceBatch to_device(const data::Batch& batch, int64_t first_row, int64_t rows, at::Device device);

/// Sum of all weights of a batch. The loss of a step is the sum over its micro-batches of
/// loss_sum() divided by the total of the whole global batch, so that every token counts the same
/// however the batch is split.
double total_weight(const data::Batch& batch);

/// Sum over tokens of weight * negative log-likelihood (nats), a fp32 scalar.
at::Tensor loss_sum(const model::Decoder& decoder, const DeviceBatch& batch);

}  // namespace sarissa::train
