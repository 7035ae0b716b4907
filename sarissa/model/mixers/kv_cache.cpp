#include "sarissa/model/mixers/kv_cache.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace sarissa::model {
namespace {

bool needs_grad(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

/// Steps that fit behind the cache's last step in its own memory.
int64_t room(const at::Tensor& cache) {
  const int64_t batch = cache.size(0), steps = cache.size(1);
  const int64_t step = cache.size(2) * cache.size(3);
  const bool ours = cache.use_count() == 1 && cache.storage().use_count() == 1;
  if (!ours || batch == 0 || step == 0 || cache.stride(1) != step ||
      cache.stride(2) != cache.size(3) || cache.stride(3) != 1) {
    return 0;
  }
  const auto elements = static_cast<int64_t>(cache.storage().nbytes() / cache.element_size());
  const int64_t last_row = cache.storage_offset() + (batch - 1) * cache.stride(0);
  const int64_t in_memory = (elements - last_row) / step - steps;
  const int64_t in_row = batch == 1 ? in_memory : cache.stride(0) / step - steps;
  return std::min(in_memory, in_row);
}

}  // namespace

void append_steps(at::Tensor& cache_BSHP, const at::Tensor& fresh_BLHP) {
  if (needs_grad(cache_BSHP) || needs_grad(fresh_BLHP)) {
    cache_BSHP = at::cat({cache_BSHP, fresh_BLHP}, 1);
    return;
  }
  // No autograd view tracking: a tracked view would hold its buffer as a second owner.
  const at::AutoDispatchBelowADInplaceOrView untracked;
  const int64_t old_steps = cache_BSHP.size(1), new_steps = fresh_BLHP.size(1);
  if (new_steps == 0) return;
  if (room(cache_BSHP) >= new_steps) {
    auto sizes = cache_BSHP.sizes().vec();
    sizes[1] += new_steps;
    cache_BSHP = cache_BSHP.as_strided(sizes, cache_BSHP.strides().vec());
  } else {
    // The first steps are a prompt: take what it needs; after that double.
    const int64_t needed = old_steps + new_steps;
    auto sizes = cache_BSHP.sizes().vec();
    sizes[1] = old_steps == 0 ? needed : 2 * needed;
    at::Tensor buffer = at::empty(sizes, cache_BSHP.options());
    buffer.narrow(1, 0, old_steps).copy_(cache_BSHP);
    cache_BSHP = buffer.narrow(1, 0, needed);
  }
  cache_BSHP.narrow(1, old_steps, new_steps).copy_(fresh_BLHP);
}

void keep_last_steps(at::Tensor& cache_BSHP, int64_t steps) {
  const int64_t extra = cache_BSHP.size(1) - steps;
  if (extra <= 0) return;
  if (needs_grad(cache_BSHP)) {
    cache_BSHP = cache_BSHP.narrow(1, extra, steps);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView untracked;
  cache_BSHP = cache_BSHP.narrow(1, extra, steps);
  // Windows are appended to about 2 W long buffers; anything much larger held a long prompt.
  if (cache_BSHP.storage().nbytes() > 4 * cache_BSHP.nbytes() + 4096) {
    cache_BSHP = cache_BSHP.clone(at::MemoryFormat::Contiguous);
  }
}

}  // namespace sarissa::model
