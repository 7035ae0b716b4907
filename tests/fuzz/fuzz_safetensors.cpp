// safetensors: what is accepted can be read, tensor by tensor, with the promised sizes.
#include "sarissa/base/error.h"
#include "sarissa/checkpoint/safetensors.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const sarissa::fuzz::MemoryFile file(data, size);
  try {
    const sarissa::checkpoint::SafetensorsFile opened(file.path());
    size_t bytes = 0;
    for (const auto& name : opened.names()) {
      const at::Tensor tensor = opened.tensor(name);
      REQUIRE(tensor.sizes() == at::IntArrayRef(opened.shape(name)));
      REQUIRE(tensor.scalar_type() == opened.dtype(name));
      bytes += tensor.nbytes();
    }
    REQUIRE(bytes < size);  // no byte belongs to two tensors
  } catch (const sarissa::Error&) {
  }
  return 0;
}
