#include "sarissa/cli/model_options.h"

#include "sarissa/base/error.h"
#include "sarissa/base/log.h"
#include "sarissa/ops/device.h"

namespace sarissa::cli {

void add_device_option(CLI::App& command, std::string& device) {
  command
      .add_option("--device", device, "cpu, cuda, cuda:N, or auto: the first GPU if there is one")
      ->capture_default_str();
}

void add_model_options(CLI::App& command, ModelOptions& options) {
  command.add_option("--model", options.model, "Model directory")->required()->type_name("DIR");
  add_device_option(command, options.device);
  command
      .add_option("--dtype", options.dtype,
                  "float32, bfloat16, or auto: bfloat16 on a GPU, float32 on the CPU")
      ->capture_default_str();
}

at::ScalarType parse_dtype(const std::string& text, at::Device device) {
  if (text == "auto") return device.is_cuda() ? at::kBFloat16 : at::kFloat;
  if (text == "float32") return at::kFloat;
  if (text == "bfloat16") return at::kBFloat16;
  throw UsageError(str("--dtype '", text, "': expected float32, bfloat16 or auto",
                       did_you_mean(text, {"float32", "bfloat16", "auto"})));
}

model::Decoder load_model(const ModelOptions& options) {
  const at::Device device = ops::parse_device(options.device);
  const at::ScalarType dtype = parse_dtype(options.dtype, device);
  model::Decoder decoder = model::load_model(options.model, device, dtype);
  decoder.requires_grad(false);
  log_info(options.model, ": ", model::parameter_count(decoder.config()), " parameters, ",
           dtype == at::kFloat ? "float32" : "bfloat16", " on ", device.str());
  return decoder;
}

}  // namespace sarissa::cli
