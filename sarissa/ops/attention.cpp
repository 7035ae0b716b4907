// Attention through torch: nothing here computes a softmax. What torch lacks is a causal mask
// aligned to the last key (its is_causal aligns to the first) and, but for the flash kernel on a
// GPU, a window; both are made of small masks over chunks of queries, never one of [L, S].
#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "sarissa/ops/device.h"
#include "sarissa/ops/ops.h"

namespace sarissa::ops {
namespace {

using at::Tensor;

constexpr int64_t kMaskElements = 1 << 22;  // of the masks of full attention
constexpr int64_t kLeastChunk = 64;         // queries; shorter chunks leave the kernels idle
constexpr int64_t kLeastCpuChunk = 32;      // the same for windows on a CPU

/// x, or a copy whose rows start at multiples of 16 bytes, as torch's GPU kernels read them.
Tensor with_aligned_rows(const Tensor& x) {
  const int64_t n = 16 / x.element_size();
  const bool aligned = x.stride(3) == 1 && x.stride(0) % n == 0 && x.stride(1) % n == 0 &&
                       x.stride(2) % n == 0 && x.storage_offset() % n == 0;
  // clone, not contiguous(): that leaves odd strides of dimensions of size 1, and the kernels look.
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

/// Attention of q [B, L, H, P] to k, v [B, S, Hkv, P] under an additive mask [L, S], a causal mask
/// (L = S) or none.
Tensor sdpa(const Tensor& q_BLHP, const Tensor& k_BSHP, const Tensor& v_BSHP,
            const std::optional<Tensor>& mask_LS, bool causal) {
  const int64_t groups = q_BLHP.size(2) / k_BSHP.size(2);
  Tensor q = q_BLHP, k = k_BSHP, v = v_BSHP;
  bool enable_gqa = groups > 1;
  bool plain = false;
  if (q.is_cuda()) {
    // The fused kernels want rows of whole 16-byte pieces and no doubles, but torch's own choice
    // of a kernel does not look at all of that: it would stop with "no kernel found to launch".
    plain = q.scalar_type() == at::kDouble || q.size(3) * q.element_size() % 16 != 0;
    q = with_aligned_rows(q), k = with_aligned_rows(k), v = with_aligned_rows(v);
    // Only the flash kernel knows grouped heads, and it takes no mask and only half precision.
    // Repeating the keys is cheaper than the [L, S] scores of the fallback.
    if (enable_gqa && (plain || mask_LS.has_value() || q.scalar_type() != at::kBFloat16)) {
      k = k.repeat_interleave(groups, 2);
      v = v.repeat_interleave(groups, 2);
      enable_gqa = false;
    }
  }
  q = q.transpose(1, 2), k = k.transpose(1, 2), v = v.transpose(1, 2);
  const Tensor out =
      plain ? std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask_LS, 0.0, causal))
            : at::scaled_dot_product_attention(q, k, v, mask_LS, /*dropout_p=*/0.0, causal,
                                               /*scale=*/std::nullopt, enable_gqa);
  return out.transpose(1, 2);
}

/// [rows, columns] of 0 where row i may see column j and -inf elsewhere: i and the window - 1
/// columns before it, where row i is column i + shift.
Tensor band_mask(int64_t rows, int64_t columns, int64_t shift, int64_t window,
                 const at::TensorOptions& options) {
  // All rows are pieces of one line, each a step further left than the one above.
  const Tensor line =
      at::full({rows + columns - 1}, -std::numeric_limits<double>::infinity(), options);
  const int64_t last = rows + shift;  // one past the place of a row's own column in row 0
  const int64_t begin = std::max<int64_t>(last - window, 0);
  line.narrow(0, begin, std::min(last, line.size(0)) - begin).zero_();
  return line.unfold(0, columns, 1).flip(0);
}

/// Full attention with S > L: chunks of queries, each against all keys up to its last.
Tensor full_after_prefix(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t length = q.size(1), keys = k.size(1), prefix = keys - length;
  const int64_t chunk = std::min(length, std::max(kLeastChunk, kMaskElements / keys));
  // The last row of a chunk sees all keys given to it, the row before one less, and so on: every
  // chunk takes the lower right corner of one mask.
  const Tensor mask = band_mask(chunk, keys, keys - chunk, keys, q.options().requires_grad(false));
  std::vector<Tensor> parts;
  for (int64_t t = 0; t < length; t += chunk) {
    const int64_t count = std::min(chunk, length - t), seen = prefix + t + count;
    const Tensor part = mask.narrow(0, chunk - count, count).narrow(1, keys - seen, seen);
    parts.push_back(sdpa(q.narrow(1, t, count), k.narrow(1, 0, seen), v.narrow(1, 0, seen),
                         part.contiguous(),
                         /*causal=*/false));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

/// Full attention: the window is all of the past.
Tensor full_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (q.size(1) == k.size(1)) return sdpa(q, k, v, std::nullopt, /*causal=*/true);
  return full_after_prefix(q, k, v);
}

/// Windowed attention of queries that all see `window` keys: q [B, L, H, P], k and v
/// [B, window - 1 + L, Hkv, P]. Chunks of C queries go as one batch, each with the window - 1 + C
/// keys that it sees: overlapping views of the same keys.
Tensor full_windows(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  // A query meets C - 1 keys too many, and the backward keeps gradients of all keys of all chunks:
  // C = window / 8 wastes an eighth and keeps 9 times the keys' gradients. GPU kernels want larger
  // pieces, and sdpa repeats the keys of grouped heads for them.
  const int64_t chunk =
      q.is_cuda() ? std::max(window, kLeastChunk) : std::max(window / 8, kLeastCpuChunk);
  const int64_t batch = q.size(0), length = q.size(1), chunks = (length + chunk - 1) / chunk;
  const int64_t seen = window - 1 + chunk;
  // Heads before steps and the batch folded into the heads, [B H, steps, P]. Steps are added at the
  // end to fill the last chunk: no query that is kept sees them.
  const auto by_head = [&](const Tensor& x, int64_t steps) {
    Tensor heads = x.transpose(1, 2);
    const int64_t added = steps - x.size(1);
    if (added > 0) heads = at::constant_pad_nd(heads, {0, 0, 0, added});
    if (heads.is_cuda()) heads = heads.contiguous();  // aligned, lest sdpa copies every chunk
    return heads.reshape({batch * x.size(2), steps, x.size(3)});
  };
  // [chunks, steps of a chunk, B H, P] views.
  const auto cut = [&](const Tensor& x, int64_t steps) {
    return by_head(x, steps + (chunks - 1) * chunk).unfold(1, steps, chunk).permute({1, 3, 0, 2});
  };
  const Tensor mask = band_mask(chunk, seen, window - 1, window, q.options().requires_grad(false));
  return sdpa(cut(q, chunk), cut(k, seen), cut(v, seen), mask, /*causal=*/false)
      .permute({2, 0, 1, 3})
      .reshape({batch, q.size(2), chunks * chunk, q.size(3)})
      .narrow(2, 0, length)
      .transpose(1, 2);
}

/// Windowed attention in chunks; memory O(L (window + C)).
Tensor windowed_in_chunks(const Tensor& q, const Tensor& k_all, const Tensor& v_all,
                          int64_t window) {
  const int64_t length = q.size(1);
  const int64_t before = std::min(k_all.size(1) - length, window - 1);
  const Tensor k = k_all.narrow(1, k_all.size(1) - length - before, length + before);
  const Tensor v = v_all.narrow(1, v_all.size(1) - length - before, length + before);
  // The first queries see all there is, up to a window.
  const int64_t first = before == window - 1 ? 0 : std::min(window - before, length);
  if (first == 0) return full_windows(q, k, v, window);
  const auto steps = [](const Tensor& x, int64_t begin, int64_t end) {
    return x.narrow(1, begin, end - begin);
  };
  const int64_t seen = before + first, keys = before + length;
  const Tensor out_first = full_attention(steps(q, 0, first), steps(k, 0, seen), steps(v, 0, seen));
  if (first == length) return out_first;
  const int64_t begin = seen + 1 - window;  // what the next query sees
  return at::cat({out_first, full_windows(steps(q, first, length), steps(k, begin, keys),
                                          steps(v, begin, keys), window)},
                 1);
}

/// Whether the flash kernel takes these: bfloat16 heads of at most 256, a multiple of 8.
bool flash_fits(const Tensor& q) {
  return q.is_cuda() && q.scalar_type() == at::kBFloat16 && q.size(3) <= 256 && q.size(3) % 8 == 0;
}

/// Causal attention by the flash kernel: it aligns causality and window to the last key, as we do,
/// and takes -1 for no window.
Tensor flash(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  return std::get<0>(at::_flash_attention_forward(
      with_aligned_rows(q), with_aligned_rows(k), with_aligned_rows(v), /*cum_seq_q=*/std::nullopt,
      /*cum_seq_k=*/std::nullopt, q.size(1), k.size(1), /*dropout_p=*/0.0, /*is_causal=*/true,
      /*return_debug_mask=*/false, /*scale=*/std::nullopt,
      /*window_size_left=*/window - 1, /*window_size_right=*/0, /*seqused_k=*/std::nullopt,
      /*alibi_slopes=*/std::nullopt));
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  kernel_dtype(q, "attention", "q");
  TORCH_CHECK(q.dim() == 4 && q.size(2) >= 1 && q.size(3) >= 1, "sarissa::attention: q has shape ",
              q.sizes(), "; expected [B, L, H, P]");
  for (const auto& [name, t] : {std::pair("k", k), std::pair("v", v)}) {
    TORCH_CHECK(t.scalar_type() == q.scalar_type() && t.device() == q.device(),
                "sarissa::attention: ", name, " is ", t.scalar_type(), " on ", t.device(),
                "; expected ", q.scalar_type(), " on ", q.device(), " as q");
    TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) >= q.size(1) &&
                    t.size(3) == q.size(3) && t.size(2) >= 1 && q.size(2) % t.size(2) == 0 &&
                    t.sizes() == k.sizes(),
                "sarissa::attention: ", name, " has shape ", t.sizes(), " for q ", q.sizes(),
                "; expected [B, S, Hkv, P] with S >= L and Hkv a divisor of H, k and v alike");
  }
  TORCH_CHECK(window >= 0, "sarissa::attention: window is ", window,
              "; expected 0 (all of the past) or the number of steps seen");
}

}  // namespace

Tensor attention(const Tensor& q_BLHP, const Tensor& k_BSHP, const Tensor& v_BSHP, int64_t window) {
  check_inputs(q_BLHP, k_BSHP, v_BSHP, window);
  const int64_t length = q_BLHP.size(1), keys = k_BSHP.size(1);
  if (q_BLHP.sym_numel() == 0) return q_BLHP.clone();
  if (window >= keys) window = 0;  // sees everything
  if (length == 1) {               // one query: what it sees needs no mask
    const int64_t seen = window == 0 ? keys : window;
    return sdpa(q_BLHP, k_BSHP.narrow(1, keys - seen, seen), v_BSHP.narrow(1, keys - seen, seen),
                std::nullopt, /*causal=*/false);
  }
  const bool square = window == 0 && length == keys;  // what every kernel knows
  if (flash_fits(q_BLHP) && !square) return flash(q_BLHP, k_BSHP, v_BSHP, window);
  return window == 0 ? full_attention(q_BLHP, k_BSHP, v_BSHP)
                     : windowed_in_chunks(q_BLHP, k_BSHP, v_BSHP, window);
}

namespace {
TORCH_LIBRARY_IMPL(sarissa, CompositeImplicitAutograd, m) { m.impl("attention", attention); }
}  // namespace

}  // namespace sarissa::ops
