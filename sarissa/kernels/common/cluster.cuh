// Thread block clusters: CTAs that run at the same time and reach each other's shared memory.
// Before sm_90 there are none, and these functions do nothing.
#pragma once

#include <cstdint>

#include "sarissa/kernels/common/tensor.cuh"

namespace sarissa::kernels {

/// No thread leaves wait_for_cluster() before all threads of the cluster have come to
/// arrive_at_cluster(). What they did before is not made known to the others, but for
/// Arrival::start().
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// In shared memory: counts bytes that other CTAs of the cluster store here. Deliveries are
/// numbered from 0 on; the next one may begin when all of the one before has been waited for.
class Arrival {
 public:
  /// By one thread, before the cluster's barrier.
  __device__ void start() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;"
        "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(this))
        : "memory");
#endif
  }
  /// By one thread, before the delivery is waited for: its size.
  __device__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
#endif
  }
  __device__ void wait(int delivery) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred there;"
        "again: mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 there, [%0], %1;"
        "@!there bra again;"
        "fence.acquire.sync_restrict::shared::cluster.cluster;}" ::"r"(shared_address(this)),
        "r"(delivery & 1)
        : "memory");
#endif
  }
  /// Stores x at `to` of CTA `rank` of the cluster and counts it in its `arrival`, if `good`; both
  /// are told by their places in this CTA.
  __device__ static void deliver(const float4& x, float4* to, Arrival* arrival, int rank,
                                 bool good) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred good; .reg .b32 to, arrival;"
        "setp.ne.s32 good, %7, 0;"
        "mapa.shared::cluster.u32 to, %0, %2;"
        "mapa.shared::cluster.u32 arrival, %1, %2;"
        "@good st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
        "[to], {%3, %4, %5, %6}, [arrival];}" ::"r"(shared_address(to)),
        "r"(shared_address(arrival)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w),
        "r"(int{good})
        : "memory");
#endif
  }

 private:
  uint64_t state_;
};

}  // namespace sarissa::kernels
