#include "sarissa/kernels/glu/glu_cuda.cuh"

namespace sarissa::kernels {
namespace {

template <Activation kActivation, class T, int V>
__global__ void glu_bwd_kernel(GluParams p) {
  using C = compute_t<T>;
  const int64_t packs = p.width / V;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.rows * packs;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t n = i / packs, f = i % packs * V;
    const T* row = static_cast<const T*>(p.gate_up) + n * p.gate_up_row + f;
    auto gate = load_pack<V>(row);
    auto up = load_pack<V>(row + p.width);
    const auto dy = load_pack<V>(static_cast<const T*>(p.dy) + n * p.dy_row + f);
    for (int k = 0; k < V; ++k) {
      const C g = load(&dy.values[k]);
      const Activated<C> a = activate<kActivation>(C(load(&gate.values[k])));
      store(&gate.values[k], g * load(&up.values[k]) * a.slope);
      store(&up.values[k], g * a.value);
    }
    T* out = static_cast<T*>(p.dgate_up) + 2 * n * p.width + f;
    store_pack(out, gate);
    store_pack(out + p.width, up);
  }
}

template <class T, int V>
Status launch(const GluParams& p, cudaStream_t s) {
  const unsigned blocks = glu_blocks(p, V);
  switch (p.activation) {
    case Activation::kSilu:
      glu_bwd_kernel<Activation::kSilu, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
    case Activation::kGelu:
      glu_bwd_kernel<Activation::kGelu, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
    case Activation::kIdentity:
      glu_bwd_kernel<Activation::kIdentity, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
  }
  return launch_status();
}

template <class T>
Status dispatch(const GluParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool packs =
      packs_fit<T>({p.gate_up, p.dy, p.dgate_up}, {p.width, p.gate_up_row, p.dy_row});
  return packs ? launch<T, kPackWidth<T>>(p, s) : launch<T, 1>(p, s);
}

}  // namespace

Status glu_bwd_cuda(const GluParams& params, DType dtype, void* stream) {
  if (params.rows == 0 || params.width == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return dispatch<T>(params, stream); });
}

}  // namespace sarissa::kernels
