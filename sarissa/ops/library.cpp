// The operators at a glance: every schema of torch.ops.sarissa. Implementations and autograd are
// in the file of each family. tap k of a FIR multiplies u[t - k]; all tensors are time-major.
//
// Shapes: B batch, L length, D width, H heads, P head width, G groups, W taps, N modes.
#include <torch/library.h>

TORCH_LIBRARY(sarissa, m) {
  m.set_python_module("sarissa.ops");
}
