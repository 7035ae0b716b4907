// Backward on CUDA by marching. A unit of 2^k <= 32 neighbouring lanes owns up to 32 channels of
// one head (a slice) and a strip of blocks: forward for the carry and the local state after every
// chunk, then backward chunk by chunk with the chunk's states in registers. The block to the right
// is read for the adjoint of the strip's last carry. Sums over a head's channels are butterflies
// inside the unit; sums over slices and over the heads that share a gate are made by a second
// kernel in index order. No atomics. Letters as in README.md.
#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {
namespace {

struct BwdPlan {
  int64_t lanes;   // of a unit: a power of two, at most 32
  int64_t slices;  // of a head
  int64_t strips, strip_blocks;
  int64_t chunks;  // per batch row in the workspace
};

// The workspace as pointers; null where a part is not needed.
template <class C>
struct Workspace {
  C *end_states, *products, *db_shares, *dc_shares, *da_shares, *dr_shares;

  explicit Workspace(const SwrBwdParams& params) {
    const SwrInputs& in = params.in;
    const SwrWorkspace plan = swr_bwd_workspace(in.batch, in.length, in.heads, in.kv_heads,
                                                in.width, in.window, in.gated, /*cuda=*/true);
    end_states = static_cast<C*>(params.workspace);
    products = end_states + plan.end_states;
    C* const gates = products + plan.products;
    C* const decays = gates + plan.gate_shares;
    db_shares = plan.gate_shares > 0 ? gates : nullptr;
    dc_shares = plan.gate_shares > 0 ? gates + plan.gate_shares / 2 : nullptr;
    da_shares = plan.decay_shares > 0 ? decays : nullptr;
    dr_shares = plan.decay_shares > 0
                    ? decays + swr_slices(in.width) * in.batch * in.length * in.heads
                    : nullptr;
  }
};

template <class T, bool kGated, bool kFull>
__global__ void __launch_bounds__(kSwrThreads)
    swr_bwd_kernel(SwrBwdParams params, BwdPlan plan, Workspace<compute_t<T>> ws) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t units_per_strip = in.heads * plan.slices;
  const int64_t i = int64_t{blockIdx.x} * kSwrThreads + threadIdx.x;
  const int64_t unit = i / plan.lanes;
  if (unit >= in.batch * plan.strips * units_per_strip) return;
  const int64_t h = unit % units_per_strip / plan.slices;
  const int64_t slice = unit % plan.slices;
  const int64_t strip = unit / units_per_strip % plan.strips;
  const int64_t row = unit / units_per_strip / plan.strips;
  const int lane = static_cast<int>(i % plan.lanes);
  const unsigned unit_mask = plan.lanes == 32 ? ~0u
                                              : ((1u << plan.lanes) - 1)
                                                    << (threadIdx.x % 32 / plan.lanes * plan.lanes);

  const SwrGrid grid = swr_grid(in, row);
  const int64_t blocks = grid.blocks();
  const int64_t first = strip * plan.strip_blocks;
  if (first >= blocks) return;
  const int64_t end = min(first + plan.strip_blocks, blocks);

  // Lanes beyond the head's width repeat its last channel, store nothing and add nothing to sums.
  const bool active = slice * kSwrSliceWidth + lane < in.width;
  const int64_t p = active ? slice * kSwrSliceWidth + lane : in.width - 1;
  const int64_t head = row * in.heads + h;
  const int64_t channel = head * in.width + p;
  const SwrChannel<T, kGated> channel_in(in, row, h, p);
  const SwrStart<C> start(in, row, h, p);
  const T* const dx =
      static_cast<const T*>(params.dx) + row * params.dx_batch + h * params.dx_head + p;
  const auto ds_at = [&](int64_t t) {
    return load(dx + t * params.dx_step) * channel_in.output_gate(t);
  };
  const auto unit_sum = [&](C x) {
    x = active ? x : C(0);
    for (int offset = static_cast<int>(plan.lanes / 2); offset > 0; offset /= 2) {
      x += __shfl_xor_sync(unit_mask, x, offset);
    }
    return x;
  };
  const auto end_state = [&](int64_t c) -> C& {
    return ws.end_states[((row * plan.chunks + c) * in.heads + h) * in.width + p];
  };
  const auto product = [&](int64_t c) -> C& {
    return ws.products[((row * plan.chunks + c) * plan.slices + slice) * in.heads + h];
  };
  const auto chunks_end = [&](int64_t k) {
    return k + 1 < blocks ? grid.first_chunk(k + 1) : grid.chunks();
  };

  // Forward: the carry into the strip, then the local state after each chunk.
  C v_first = start.v;
  if (first > 0) {
    v_first = first == 1 ? start.w : C(0);
    for (int64_t t = grid.block_begin(first - 1); t < grid.block_end(first - 1); ++t) {
      v_first = channel_in.coefficient(t) * v_first + channel_in.input(t);
    }
  }
  for (int64_t k = first; k < end; ++k) {
    C w = k == 0 ? start.w : C(0);
    C r = k == 0 ? start.r : C(1);
    for (int64_t c = grid.first_chunk(k); c < chunks_end(k); ++c) {
      for (int64_t t = grid.chunk_begin(c); t < grid.chunk_end(c); ++t) {
        const C a = channel_in.coefficient(t);
        w = a * w + channel_in.input(t);
        r *= a;
      }
      if (active) end_state(c) = w;
      if (lane == 0) product(c) = r;
    }
  }
  __syncwarp(unit_mask);  // products were written by lane 0

  // The adjoints after the strip's last step: gw of w, gp of the p scan, gr of r.
  const bool last_complete = kFull || grid.last_block_complete();
  const auto read = [](const void* x, int64_t at) {
    return x != nullptr ? static_cast<const C*>(x)[at] : C(0);
  };
  // The v of an incomplete last block leaves with the final state.
  const auto passed_v = [&](int64_t k) {
    return k == blocks - 1 && !last_complete ? read(params.dv_out, channel) : C(0);
  };
  C gw, gp = C(0), gr = C(0);
  if (end == blocks) {
    gw = read(last_complete ? params.dv_out : params.dw_out, channel);
    if (!last_complete) gr = read(params.dr_out, head);
  } else {
    gw = C(0);
    for (int64_t t = grid.block_end(end) - 1; t >= grid.block_begin(end); --t) {
      gw = channel_in.coefficient(t) * (ds_at(t) + gw);
    }
    gw += passed_v(end);
  }

  for (int64_t k = end - 1; k >= first; --k) {
    const C v = k == first ? v_first : end_state(grid.first_chunk(k) - 1);
    for (int64_t c = chunks_end(k) - 1; c >= grid.first_chunk(k); --c) {
      const int64_t begin = grid.chunk_begin(c);
      const int n = static_cast<int>(grid.chunk_end(c) - begin);
      C a[kSwrChunk], w[kSwrChunk + 1], r[kSwrChunk + 1];
      if (c > grid.first_chunk(k)) {
        w[0] = end_state(c - 1);
        r[0] = product(c - 1);
      } else {
        w[0] = k == 0 ? start.w : C(0);
        r[0] = k == 0 ? start.r : C(1);
      }
#pragma unroll
      for (int j = 0; j < kSwrChunk; ++j) {
        if (j < n) {
          a[j] = channel_in.coefficient(begin + j);
          w[j + 1] = a[j] * w[j] + channel_in.input(begin + j);
          r[j + 1] = r[j] * a[j];
        }
      }
#pragma unroll
      for (int j = kSwrChunk - 1; j >= 0; --j) {
        if (j >= n) continue;
        const int64_t t = begin + j;
        const C dy = load(dx + t * params.dx_step);
        const C ds = dy * channel_in.output_gate(t);
        const C pw = ds + gw;
        C share = pw * w[j];
        if constexpr (!kFull) {
          const C pv = ds + gp;
          share += r[j] * v * pv;
          gp = a[j] * pv;
        }
        gw = a[j] * pw;
        if (active) {
          T* const du = static_cast<T*>(params.du) + (row * in.length + t) * params.du_step +
                        h * in.width + p;
          if constexpr (kGated) {
            const C gate = channel_in.input_gate(t);
            const C db = pw * channel_in.value(t) * gate * (C(1) - gate);
            const C dc = dy * (kFull ? w[j + 1] : w[j + 1] + r[j + 1] * v);
            store(du, dy + pw * gate);
            if (ws.db_shares != nullptr) {
              const int64_t at = (row * in.length + t) * in.heads * in.width + h * in.width + p;
              ws.db_shares[at] = db;
              ws.dc_shares[at] = dc;
            } else {
              const int64_t at = (row * in.length + t) * params.dgate_step + h * in.width + p;
              store(static_cast<T*>(params.db) + at, db);
              store(static_cast<T*>(params.dc) + at, dc);
            }
          } else {
            store(du, pw);
          }
        }
        C da = unit_sum(share);
        if (slice == 0) da += gr * r[j];
        gr *= a[j];
        if (lane == 0) {
          if (ws.da_shares != nullptr) {
            ws.da_shares[((slice * in.batch + row) * in.length + t) * in.heads + h] = da;
          } else {
            store(static_cast<T*>(params.da) + (row * in.length + t) * params.da_step + h,
                  da * channel_in.coefficient_slope(a[j]));
          }
        }
      }
    }
    if (k > 0) {  // the carry's adjoint enters the block before
      gw = gp + passed_v(k);
      gp = C(0);
      gr = C(0);
    }
  }

  if (first > 0) return;
  // From the adjoints before the first step to the gradients of the given state.
  const C carry = kFull ? gw : gp;  // the adjoint of r v
  const C v0 = read(in.v, channel);
  const C r0 = in.r != nullptr ? read(in.r, head) : C(1);
  C dr = unit_sum(carry * v0);
  if (slice == 0) dr += gr;
  if (active) {
    static_cast<C*>(params.dw)[channel] = gw;
    static_cast<C*>(params.dv)[channel] = r0 * carry + passed_v(0);
  }
  if (lane == 0) {
    if (ws.dr_shares != nullptr) {
      ws.dr_shares[slice * in.batch * in.heads + head] = dr;
    } else {
      static_cast<C*>(params.dr)[head] = dr;
    }
  }
}

// Gradients of b and c: the sum over the heads that share them. A thread per (b, t, kv head, p).
template <class T>
__global__ void __launch_bounds__(kSwrThreads)
    sum_gate_shares(SwrBwdParams params, Workspace<compute_t<T>> ws) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t gates = in.kv_heads * in.width;
  const int64_t i = int64_t{blockIdx.x} * kSwrThreads + threadIdx.x;
  if (i >= in.batch * in.length * gates) return;
  const int64_t group = in.heads / in.kv_heads;
  const int64_t step = i / gates, k = i % gates / in.width, p = i % in.width;
  const int64_t from = (step * in.heads + k * group) * in.width + p;
  C db = C(0), dc = C(0);
  for (int64_t g = 0; g < group; ++g) {
    db += ws.db_shares[from + g * in.width];
    dc += ws.dc_shares[from + g * in.width];
  }
  const int64_t to = step * params.dgate_step + k * in.width + p;
  store(static_cast<T*>(params.db) + to, db);
  store(static_cast<T*>(params.dc) + to, dc);
}

// Gradients of a and r: the sum over the slices of a head. A thread per (b, t, h), and one more
// "step" per batch row for r.
template <class T, bool kGated>
__global__ void __launch_bounds__(kSwrThreads)
    sum_decay_shares(SwrBwdParams params, int64_t slices, Workspace<compute_t<T>> ws) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t i = int64_t{blockIdx.x} * kSwrThreads + threadIdx.x;
  const int64_t heads = in.batch * in.heads;
  const int64_t steps = heads * in.length;
  if (i >= steps + heads) return;
  C sum = C(0);
  if (i >= steps) {
    for (int64_t s = 0; s < slices; ++s) sum += ws.dr_shares[s * heads + i - steps];
    static_cast<C*>(params.dr)[i - steps] = sum;
    return;
  }
  for (int64_t s = 0; s < slices; ++s) sum += ws.da_shares[s * steps + i];
  const int64_t h = i % in.heads, t = i / in.heads % in.length, row = i / in.heads / in.length;
  const SwrChannel<T, kGated> channel_in(in, row, h, 0);
  store(static_cast<T*>(params.da) + (row * in.length + t) * params.da_step + h,
        sum * channel_in.coefficient_slope(channel_in.coefficient(t)));
}

template <class T, bool kGated, bool kFull>
Status launch_bwd(const SwrBwdParams& params, cudaStream_t stream) {
  const SwrInputs& in = params.in;
  const auto ctas = [](int64_t threads) {
    return static_cast<unsigned>(ceil_div<int64_t>(threads, kSwrThreads));
  };
  BwdPlan plan;
  plan.lanes = 1;
  while (plan.lanes < 32 && plan.lanes < in.width) plan.lanes *= 2;
  plan.slices = swr_slices(in.width);
  const int64_t units = in.batch * in.heads * plan.slices;
  const int64_t blocks = swr_max_blocks(in.window, in.length);
  plan.strip_blocks = swr_strip_blocks(blocks, units * plan.lanes);
  plan.strips = ceil_div(blocks, plan.strip_blocks);
  plan.chunks = swr_max_chunks(in.window, in.length);
  const Workspace<compute_t<T>> ws(params);
  swr_bwd_kernel<T, kGated, kFull>
      <<<ctas(units * plan.strips * plan.lanes), kSwrThreads, 0, stream>>>(params, plan, ws);
  if (const Status status = launch_status(); !status.ok()) return status;
  if (kGated && ws.db_shares != nullptr && in.length > 0) {
    sum_gate_shares<T>
        <<<ctas(in.batch * in.length * in.kv_heads * in.width), kSwrThreads, 0, stream>>>(params,
                                                                                          ws);
    if (const Status status = launch_status(); !status.ok()) return status;
  }
  if (plan.slices > 1) {
    sum_decay_shares<T, kGated>
        <<<ctas(in.batch * in.heads * (in.length + 1)), kSwrThreads, 0, stream>>>(params,
                                                                                  plan.slices, ws);
  }
  return launch_status();
}

}  // namespace

Status swr_bwd_cuda(const SwrBwdParams& params, DType dtype, void* stream) {
  if (swr_chained_bwd_fits(params, dtype)) return swr_chained_bwd(params, dtype, stream);
  if (swr_bwd_march_fits(params, dtype)) return swr_bwd_march(params, dtype, stream);
  return with_dtype(dtype, [&]<class T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    const bool full = params.in.window == 0;
    if (params.in.gated) {
      return full ? launch_bwd<T, true, true>(params, s) : launch_bwd<T, true, false>(params, s);
    }
    return full ? launch_bwd<T, false, true>(params, s) : launch_bwd<T, false, false>(params, s);
  });
}

}  // namespace sarissa::kernels
