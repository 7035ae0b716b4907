// Forward on CUDA by marching: a thread owns one channel and a strip of blocks, and recomputes the
// block to the left of its strip for the carry. A full recurrence is one strip.
#include "sarissa/kernels/swr/swr_cuda.cuh"

namespace sarissa::kernels {
namespace {

template <class T, bool kGated, bool kFull>
__global__ void __launch_bounds__(kSwrThreads)
    swr_fwd_kernel(SwrFwdParams params, int64_t strips, int64_t strip_blocks) {
  using C = compute_t<T>;
  const SwrInputs& in = params.in;
  const int64_t channels = in.heads * in.width;
  const int64_t i = int64_t{blockIdx.x} * kSwrThreads + threadIdx.x;
  if (i >= in.batch * strips * channels) return;
  const int64_t channel = i % channels;
  const int64_t strip = i / channels % strips;
  const int64_t row = i / channels / strips;
  const int64_t h = channel / in.width;

  const SwrGrid grid = swr_grid(in, row);
  const int64_t blocks = grid.blocks();
  const int64_t first = strip * strip_blocks;
  if (first >= blocks) return;
  const int64_t end = min(first + strip_blocks, blocks);
  const SwrChannel<T, kGated> channel_in(in, row, h, channel % in.width);
  const SwrStart<C> start(in, row, h, channel % in.width);

  C w = start.w, r = start.r, v = start.v;
  if (first > 0) {
    v = first == 1 ? start.w : C(0);
    for (int64_t t = grid.block_begin(first - 1); t < grid.block_end(first - 1); ++t) {
      v = channel_in.coefficient(t) * v + channel_in.input(t);
    }
    w = C(0);
    r = C(1);
  }
  T* const x = static_cast<T*>(params.x) + row * in.length * channels + channel;
  for (int64_t k = first; k < end; ++k) {
    for (int64_t t = grid.block_begin(k); t < grid.block_end(k); ++t) {
      const C a = channel_in.coefficient(t);
      w = a * w + channel_in.input(t);
      C out = w;
      if constexpr (!kFull) {
        r *= a;
        out = w + r * v;
      }
      if constexpr (kGated) out = channel_in.output_gate(t) * out + channel_in.value(t);
      store(x + t * channels, out);
    }
    if (!kFull && (k + 1 < blocks || grid.last_block_complete())) {
      v = w;
      w = C(0);
      r = C(1);
    }
  }
  if (end < blocks) return;
  const int64_t head = row * in.heads + h;
  static_cast<C*>(params.w)[row * channels + channel] = kFull ? C(0) : w;
  static_cast<C*>(params.v)[row * channels + channel] = kFull ? w : v;
  if (channel % in.width == 0) static_cast<C*>(params.r)[head] = r;
  if (channel == 0) {
    params.index[row] = kFull ? 0 : static_cast<int32_t>((grid.index + in.length) % grid.window);
  }
}

template <class T, bool kGated, bool kFull>
Status launch_fwd(const SwrFwdParams& params, cudaStream_t stream) {
  const SwrInputs& in = params.in;
  const int64_t channels = in.batch * in.heads * in.width;
  const int64_t blocks = swr_max_blocks(in.window, in.length);
  const int64_t strip_blocks = swr_strip_blocks(blocks, channels);
  const int64_t strips = ceil_div(blocks, strip_blocks);
  const int64_t ctas = ceil_div<int64_t>(channels * strips, kSwrThreads);
  swr_fwd_kernel<T, kGated, kFull>
      <<<static_cast<unsigned>(ctas), kSwrThreads, 0, stream>>>(params, strips, strip_blocks);
  return launch_status();
}

}  // namespace

Status swr_fwd_cuda(const SwrFwdParams& params, DType dtype, void* stream) {
  return swr_with_dtype(dtype, [&]<class T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    const bool full = params.in.window == 0;
    if (params.in.gated) {
      return full ? launch_fwd<T, true, true>(params, s) : launch_fwd<T, true, false>(params, s);
    }
    return full ? launch_fwd<T, false, true>(params, s) : launch_fwd<T, false, false>(params, s);
  });
}

}  // namespace sarissa::kernels
