// Helpers of the CUDA kernels: element access in compute precision, launch status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "sarissa/kernels/common/dtype.h"
#include "sarissa/kernels/common/status.h"

namespace sarissa::kernels {

__device__ inline double load(const double* p) { return *p; }
__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ inline void store(double* p, double x) { *p = x; }
__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

/// The status of the launch just made on this thread, of the variant called `kernel`.
inline Status launch_status(const char* kernel = nullptr) {
  const cudaError_t e = cudaGetLastError();
  return {e == cudaSuccess ? nullptr : cudaGetErrorString(e), kernel};
}

/// Calls run.template operator()<T>() for the element type.
template <class Run>
Status with_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64:
      return run.template operator()<double>();
    case DType::kFloat32:
      return run.template operator()<float>();
    case DType::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
  }
  return {"unknown element type"};
}

/// Launches a kernel that may start while the one before it in the stream ends, on GPUs that can
/// (programmatic dependent launch): what a kernel spends before its first instruction is then
/// hidden. The kernel must call wait_for_earlier_kernels() before it reads or writes global memory.
/// Every `cluster` CTAs that are neighbours along x form a cluster.
template <class... Params, class... Args>
void launch_early_in_clusters(int cluster, void (*kernel)(Params...), dim3 grid, int threads,
                              size_t shared, cudaStream_t stream, const Args&... args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (major >= 9) {
    cudaLaunchAttribute& early = attributes[count++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& dimension = attributes[count++];
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kernel, args...);
}
template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                  cudaStream_t stream, const Args&... args) {
  launch_early_in_clusters(1, kernel, grid, threads, shared, stream, args...);
}

/// Waits until everything that was in the stream before this kernel is done; see launch_early. From
/// then on, the blocks of the next kernel may take the places that this one leaves free.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Asks the L2 cache for what lies at p, if `good`. Nothing is read, and L2 sees what other kernels
/// still write: it may come before wait_for_earlier_kernels(), and what a kernel needs is then near
/// when the wait is over.
__device__ inline void prefetch(const void* p, bool good = true) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %1, 0; @p prefetch.global.L2 [%0];}" ::"l"(p),
               "r"(int{good}));
}

/// prefetch() of rows [begin, end) of `elements` elements, `stride` elements apart, row 0 at
/// `rows`: by a warp, whose lanes take a line of 128 bytes each.
template <class T>
__device__ inline void prefetch_rows(const T* rows, int64_t stride, int64_t begin, int64_t end,
                                     int elements) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));
  const int lines = ceil_div(elements, kLine);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < static_cast<int>(end - begin) * lines;
       i += 32) {
    prefetch(rows + (begin + i / lines) * stride + i % lines * kLine);
  }
}

/// Sets `count` units of 16 bytes to zero by a kernel. With a memset before it a kernel could not
/// be launched early.
constexpr int kClearThreads = 256;
template <class Unit>
__global__ void __launch_bounds__(kClearThreads) clear_kernel(Unit* units, int64_t count) {
  wait_for_earlier_kernels();
  const int64_t i = int64_t{blockIdx.x} * kClearThreads + threadIdx.x;
  if (i < count) units[i] = {};
}
inline void clear_early(void* units, int64_t count, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(count, kClearThreads));
  launch_early(clear_kernel<uint4>, dim3(blocks), kClearThreads, 0, stream,
               static_cast<uint4*>(units), count);
}

/// Sums x[i] over kLanes neighbouring lanes for kRows rows i. Lane l of them is left with the sums
/// of kRows / kLanes rows (at least one) in x[0..]; returns the first of these rows.
template <int kLanes, int kRows>
__device__ int reduce_scatter(float* x, int lane) {
  if constexpr (kLanes == 1) {
    return 0;
  } else if constexpr (kRows == 1) {
    x[0] += __shfl_xor_sync(~0u, x[0], kLanes / 2);
    return reduce_scatter<kLanes / 2, 1>(x, lane);
  } else {
    constexpr int kHalf = kRows / 2;
    const bool upper = lane & (kLanes / 2);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? x[i] : x[i + kHalf];
      const float kept = upper ? x[i + kHalf] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, sent, kLanes / 2);
    }
    return (upper ? kHalf : 0) + reduce_scatter<kLanes / 2, kHalf>(x, lane);
  }
}

/// Lets a kernel have `bytes` of dynamic shared memory. The limit is only ever raised: another
/// thread may be about to launch the same kernel with more.
template <class Kernel>
Status allow_shared_memory(Kernel* kernel, size_t bytes) {
  cudaFuncAttributes now{};
  cudaError_t e = cudaFuncGetAttributes(&now, kernel);
  if (e == cudaSuccess && bytes > static_cast<size_t>(now.maxDynamicSharedSizeBytes)) {
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes));
  }
  return {e == cudaSuccess ? nullptr : cudaGetErrorString(e)};
}

/// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

/// Bytes of shared memory that a block can have on the current device.
inline int most_shared_memory() {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most;
}

/// `bytes` of dynamic shared memory, or so much more that a block has its multiprocessor to itself.
inline size_t alone_on_multiprocessor(size_t bytes) {
  const auto half = static_cast<size_t>(most_shared_memory()) / 2;
  return bytes > half ? bytes : half + 1024;
}

}  // namespace sarissa::kernels
