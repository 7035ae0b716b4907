// Sliding window recurrences, plain (swr) and with the gates of a Phalanx layer; see README.md for
// the maths and the letters.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"
#include "sarissa/kernels/swr/swr_plan.h"

namespace sarissa::kernels {

/// What forward and backward read. Element type T; *_batch, *_step, *_head are strides in elements.
/// Gated (phalanx): the coefficient is decay_max * sigmoid(a), the input is sigmoid(b) u, and
/// y = c x + u.
struct SwrInputs {
  int64_t batch, length, heads, width;
  int64_t window;  // 0: full recurrence
  const void* a;   // [B, L, H], heads contiguous
  int64_t a_batch, a_step;
  const void* u;  // [B, L, H, P], channels contiguous; phalanx: v
  int64_t u_batch, u_step, u_head;
  bool gated = false;
  // Gated only.
  const void* b = nullptr;  // [B, L, Hkv, P], the last two contiguous; head h uses h / (H / Hkv)
  const void* c = nullptr;
  int64_t gate_batch = 0, gate_step = 0;
  int64_t kv_heads = 0;  // divides heads; plain: equal to heads
  double decay_max = 1.0;
  // The state before the first step, contiguous, compute_t<T>. All null: the sequence starts here
  // (w = 0, r = 1, v = 0, index = 0).
  const void* w = nullptr;         // [B, H, P]
  const void* r = nullptr;         // [B, H]
  const void* v = nullptr;         // [B, H, P]
  const int32_t* index = nullptr;  // [B], in [0, window); full recurrence: ignored
};

/// What a forward of phalanx with a window can leave for the marching backward on a GPU, in
/// compute_t<T>; nulls: nothing. Chunk j of block n has number n K + j, K = swr_chunks_per_block.
/// Full recurrence, for the chained backward: a chunk is a tile of kSwrTile steps; no products.
struct SwrSaved {
  void* states = nullptr;    // [B, chunks, H, P]: x = w + r v before the chunk's first step
  void* products = nullptr;  // [B, chunks / K, H]: r after the block's last step
  int64_t chunks = 0;        // K swr_max_blocks(window, length)
};

/// Outputs are contiguous. The state is the one after the last step.
struct SwrFwdParams {
  SwrInputs in;
  void* x;         // [B, L, H, P]: x, or y when gated
  void* w;         // [B, H, P] compute_t<T>
  void* r;         // [B, H]
  void* v;         // [B, H, P]
  int32_t* index;  // [B]
  SwrSaved saved;
  void* workspace = nullptr;  // swr_fwd_workspace(...) elements of compute_t<T>, on a GPU
};

struct SwrBwdParams {
  SwrInputs in;
  const void* dx;  // [B, L, H, P] gradient of x (gated: of y), channels contiguous
  int64_t dx_batch, dx_step, dx_head;
  // Gradients of the state after the last step, contiguous, compute_t<T>; null: zero.
  const void* dw_out;  // [B, H, P]
  const void* dr_out;  // [B, H]
  const void* dv_out;  // [B, H, P]
  // Gradients of the inputs: rows of L contiguous steps per batch row, *_step elements apart.
  void* da;
  int64_t da_step;
  void* du;
  int64_t du_step;
  void* db;  // gated only
  void* dc;
  int64_t dgate_step;
  // Gradients of the state before the first step, contiguous, compute_t<T>.
  void* dw;         // [B, H, P]
  void* dr;         // [B, H]
  void* dv;         // [B, H, P]
  void* workspace;  // swr_bwd_workspace(...).total() elements of compute_t<T>
  SwrSaved saved;   // what the forward saved, or nulls
};

/// Heads [begin, end) of the B * H (batch, head) pairs.
Status swr_fwd_cpu(const SwrFwdParams& params, DType dtype, int64_t begin, int64_t end);
/// Kv heads [begin, end) of the B * Hkv (batch, kv head) pairs.
Status swr_bwd_cpu(const SwrBwdParams& params, DType dtype, int64_t begin, int64_t end);

Status swr_fwd_cuda(const SwrFwdParams& params, DType dtype, void* stream);
Status swr_bwd_cuda(const SwrBwdParams& params, DType dtype, void* stream);

}  // namespace sarissa::kernels
