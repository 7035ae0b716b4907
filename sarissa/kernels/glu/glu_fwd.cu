#include "sarissa/kernels/glu/glu_cuda.cuh"

namespace sarissa::kernels {
namespace {

template <Activation kActivation, class T, int V>
__global__ void glu_fwd_kernel(GluParams p) {
  const int64_t packs = p.width / V;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < p.rows * packs;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t n = i / packs, f = i % packs * V;
    const T* gate = static_cast<const T*>(p.gate_up) + n * p.gate_up_row + f;
    auto out = load_pack<V>(gate);
    const auto up = load_pack<V>(gate + p.width);
    for (int k = 0; k < V; ++k) {
      store(&out.values[k],
            activate<kActivation>(load(&out.values[k])).value * load(&up.values[k]));
    }
    store_pack(static_cast<T*>(p.y) + n * p.width + f, out);
  }
}

template <class T, int V>
Status launch(const GluParams& p, cudaStream_t s) {
  const unsigned blocks = glu_blocks(p, V);
  switch (p.activation) {
    case Activation::kSilu:
      glu_fwd_kernel<Activation::kSilu, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
    case Activation::kGelu:
      glu_fwd_kernel<Activation::kGelu, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
    case Activation::kIdentity:
      glu_fwd_kernel<Activation::kIdentity, T, V><<<blocks, kGluThreads, 0, s>>>(p);
      break;
  }
  return launch_status();
}

template <class T>
Status dispatch(const GluParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool packs = packs_fit<T>({p.gate_up, p.y}, {p.width, p.gate_up_row});
  return packs ? launch<T, kPackWidth<T>>(p, s) : launch<T, 1>(p, s);
}

}  // namespace

Status glu_fwd_cuda(const GluParams& params, DType dtype, void* stream) {
  if (params.rows == 0 || params.width == 0) return {};
  return with_dtype(dtype, [&]<class T>() { return dispatch<T>(params, stream); });
}

}  // namespace sarissa::kernels
