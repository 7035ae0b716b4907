// Helpers of the CPU kernels.
#pragma once

// Compiles the function for AVX-512, AVX2 and plain x86-64 and picks at load time, so one binary
// runs anywhere and still vectorises. It works on functions, not templates: put it on a thin
// non-template wrapper per element type around an always_inline template.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define SARISSA_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SARISSA_CPU_CLONES
#endif

#define SARISSA_INLINE [[gnu::always_inline]] inline
