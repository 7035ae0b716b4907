#include "sarissa/train/loss.h"

#include <ATen/ops/from_blob.h>

#include "sarissa/base/error.h"
#include "sarissa/ops/ops.h"

namespace sarissa::train {
namespace {

// A copy on `device` of rows of a row-major host array.
template <class T>
at::Tensor copy_rows(const std::vector<T>& values, int64_t first_row, int64_t rows, int64_t length,
                     at::ScalarType dtype, at::Device device) {
  SARISSA_CHECK((first_row + rows) * length <= static_cast<int64_t>(values.size()),
                "to_device: rows ", first_row, " to ", first_row + rows, " of a batch of ",
                values.size() / length);
  // from_blob wants a mutable pointer; the view is only read, by the copy.
  T* data = const_cast<T*>(values.data()) + first_row * length;
  return at::from_blob(data, {rows, length}, at::TensorOptions().dtype(dtype))
      .to(device, dtype, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace

DeviceBatch to_device(const data::Batch& batch, int64_t first_row, int64_t rows,
                      at::Device device) {
  const auto copy = [&](const auto& values, at::ScalarType dtype) {
    return copy_rows(values, first_row, rows, batch.length, dtype, device);
  };
  return {copy(batch.inputs, at::kLong), copy(batch.targets, at::kLong),
          copy(batch.weights, at::kFloat)};
}

double total_weight(const data::Batch& batch) {
  double total = 0;
  for (const float weight : batch.weights) total += weight;
  return total;
}

at::Tensor loss_sum(const model::Decoder& decoder, const DeviceBatch& batch) {
  const at::Tensor hidden_BLD = decoder.hidden(batch.inputs_BL);
  return ops::linear_cross_entropy(hidden_BLD.flatten(0, 1), decoder.head(),
                                   batch.targets_BL.flatten(), batch.weights_BL.flatten());
}

}  // namespace sarissa::train
