// Attention through torch: nothing here computes a softmax. What torch lacks is a causal mask
// aligned to the last key (its is_causal aligns to the first) and, but for the flash kernel on a
// GPU, a window; both are made of small masks over chunks of queries, never one of [L, S].
#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>
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
  const auto index = options.dtype(at::kLong);
  const Tensor distance =
      (at::arange(rows, index) + shift).unsqueeze(1) - at::arange(columns, index);
  return at::zeros({rows, columns}, options)
      .masked_fill_((distance < 0).logical_or_(distance >= window),
                    -std::numeric_limits<double>::infinity());
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

/// x [B, n C, H, P] as [B n, C, H, P].
Tensor fold_chunks(const Tensor& x, int64_t chunk) {
  return x.reshape({x.size(0) * (x.size(1) / chunk), chunk, x.size(2), x.size(3)});
}

/// Windowed attention of queries in chunks of C >= window - 1: chunk i needs the keys of the chunks
/// i - 1 and i alone. The first chunk goes with what precedes the queries, the others together as
/// one batch; memory O(L C).
Tensor windowed_in_chunks(const Tensor& q, const Tensor& k_all, const Tensor& v_all,
                          int64_t window) {
  const int64_t length = q.size(1);
  const int64_t before = std::min(k_all.size(1) - length, window - 1);
  const Tensor k = k_all.narrow(1, k_all.size(1) - length - before, length + before);
  const Tensor v = v_all.narrow(1, v_all.size(1) - length - before, length + before);
  const at::TensorOptions mask_options = q.options().requires_grad(false);
  const int64_t chunk = std::max(window, kLeastChunk);
  const int64_t first = std::min(chunk, length);
  const Tensor first_mask = band_mask(first, before + first, before, window, mask_options);
  const Tensor out_first = sdpa(q.narrow(1, 0, first), k.narrow(1, 0, before + first),
                                v.narrow(1, 0, before + first), first_mask, /*causal=*/false);
  if (length == first) return out_first;

  const int64_t rest = length - chunk;
  const int64_t padding = (chunk - rest % chunk) % chunk;  // later steps: no query sees them
  const auto pad = [&](const Tensor& x) {
    return padding == 0 ? x : at::constant_pad_nd(x, {0, 0, 0, 0, 0, padding});
  };
  const auto with_previous = [&](const Tensor& x) {
    const Tensor own = pad(x.narrow(1, before, length));
    const int64_t n = own.size(1) - chunk;
    return at::cat(
        {fold_chunks(own.narrow(1, 0, n), chunk), fold_chunks(own.narrow(1, chunk, n), chunk)}, 1);
  };
  const Tensor out_rest =
      sdpa(fold_chunks(pad(q.narrow(1, chunk, rest)), chunk), with_previous(k), with_previous(v),
           band_mask(chunk, 2 * chunk, chunk, window, mask_options), /*causal=*/false)
          .reshape({q.size(0), rest + padding, q.size(2), q.size(3)})
          .narrow(1, 0, rest);
  return at::cat({out_first, out_rest}, 1);
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
  if (q_BLHP.numel() == 0) return q_BLHP.clone();
  if (window >= keys) window = 0;  // sees everything
  if (length == 1) {               // one query: what it sees needs no mask
    const int64_t seen = window == 0 ? keys : window;
    return sdpa(q_BLHP, k_BSHP.narrow(1, keys - seen, seen), v_BSHP.narrow(1, keys - seen, seen),
                std::nullopt, /*causal=*/false);
  }
  if (window == 0 && length == keys) {
    return sdpa(q_BLHP, k_BSHP, v_BSHP, std::nullopt, /*causal=*/true);
  }
  if (flash_fits(q_BLHP)) return flash(q_BLHP, k_BSHP, v_BSHP, window);
  return window == 0 ? full_after_prefix(q_BLHP, k_BSHP, v_BSHP)
                     : windowed_in_chunks(q_BLHP, k_BSHP, v_BSHP, window);
}

namespace {
TORCH_LIBRARY_IMPL(sarissa, CompositeImplicitAutograd, m) { m.impl("attention", attention); }
}  // namespace

}  // namespace sarissa::ops
