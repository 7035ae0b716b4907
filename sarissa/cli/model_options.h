// Options shared by the commands that run a model.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "sarissa/cli/commands.h"
#include "sarissa/model/decoder.h"

namespace sarissa::cli {

struct ModelOptions {
  std::string model;
  std::string device = "auto";
  std::string dtype = "auto";
};

/// Adds --model DIR (required), --device and --dtype.
void add_model_options(CLI::App& command, ModelOptions& options);

/// Adds --device alone.
void add_device_option(CLI::App& command, std::string& device);

/// "float32", "bfloat16", or "auto": bfloat16 on CUDA, float32 on the CPU. Throws UsageError.
at::ScalarType parse_dtype(const std::string& text, at::Device device);

/// Loads the model and says on stderr what was loaded and where.
model::Decoder load_model(const ModelOptions& options);

}  // namespace sarissa::cli
