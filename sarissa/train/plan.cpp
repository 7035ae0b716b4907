#include "sarissa/train/plan.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "sarissa/base/error.h"
#include "sarissa/base/progress.h"
#include "sarissa/infer/footprint.h"
#include "sarissa/ops/device.h"
#include "sarissa/train/hardware.h"

namespace sarissa::train {
namespace {

constexpr int64_t kFloatBytes = 4;
constexpr int64_t kLogitsChunk = 1024;  // tokens whose logits are held at a time, about

int64_t activation_elements(const model::ModelConfig& model, int64_t tokens) {
  int64_t per_token = 0;
  for (const auto kind : model.layers()) {
    per_token += 8 * model.dim + 3 * model.resolved_mlp_dim();
    if (kind == model::MixerKind::kAttention || kind == model::MixerKind::kWindowedAttention) {
      per_token += 3 * model.dim;
    }
  }
  return per_token * tokens;
}

std::string gib(int64_t bytes) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(bytes < (int64_t{10} << 30) ? 3 : 1)
      << double(bytes) / double(int64_t{1} << 30) << " GiB";
  return out.str();
}

// Where the run would take place; a device that this machine lacks is named, not refused.
std::string describe_device(const RunConfig& config) {
  try {
    const at::Device device = ops::parse_device(config.train.device);
    return device.is_cuda() ? sarissa::str(device.str(), " (", device_name(device), ")")
                            : device.str();
  } catch (const UsageError&) {
    return str(config.train.device, " (not on this machine: ", ops::cuda_unavailable_reason(), ")");
  }
}

// The dtype of the weights, without asking for the device when the configuration names one.
bool is_bf16(const RunConfig& config) {
  if (config.train.dtype != "auto") return config.train.dtype == "bfloat16";
  if (config.train.device == "auto") return ops::cuda_available();
  return config.train.device.starts_with("cuda");
}

void describe_layers(std::ostream& out, const model::ModelConfig& model) {
  out << std::left << std::setw(10) << "mixer" << std::right << std::setw(8) << "layers"
      << std::setw(24) << "parameters per mixer"
      << "\n";
  for (const auto& row : infer::mixer_summaries(model)) {
    out << std::left << std::setw(10) << model::to_string(row.kind) << std::right << std::setw(8)
        << row.layers << std::setw(24) << row.parameters_per_mixer << "\n";
  }
}

}  // namespace

MemoryEstimate estimate_memory(const RunConfig& config, int64_t weight_bytes) {
  const int64_t parameters = model::parameter_count(config.model);
  const bool mixed = weight_bytes != kFloatBytes;
  const int64_t tokens = config.train.resolved_micro_batch() * config.train.context;
  const int64_t chunk = std::min(tokens, kLogitsChunk);
  MemoryEstimate memory;
  memory.weights = parameters * weight_bytes;
  memory.masters = mixed ? parameters * kFloatBytes : 0;
  memory.gradients = parameters * (kFloatBytes + (mixed ? weight_bytes : 0));
  memory.moments = 2 * parameters * kFloatBytes;
  memory.activations = activation_elements(config.model, tokens) * weight_bytes +
                       chunk * config.model.vocab_size * kFloatBytes;
  return memory;
}

std::string describe_run(const RunConfig& config) {
  const auto& train = config.train;
  const bool bf16 = is_bf16(config);
  const MemoryEstimate memory = estimate_memory(config, bf16 ? 2 : kFloatBytes);
  const int64_t tokens_per_step = train.batch * train.context;
  const int64_t micro_batches = train.batch / train.resolved_micro_batch();
  std::ostringstream out;
  const auto line = [&out](const char* name, const auto&... values) {
    out << std::left << std::setw(22) << name << str(values...) << "\n";
  };
  describe_layers(out, config.model);
  out << "\n";
  const int64_t parameters = model::parameter_count(config.model);
  line("parameters", parameters, " (", short_count(double(parameters)), ")");
  line("layers", config.model.layers().size());
  line("device", describe_device(config));
  line("dtype", bf16 ? "bfloat16, with float32 masters" : "float32");
  line("tokens per step", tokens_per_step, " = ", train.batch, " sequences of ", train.context,
       micro_batches > 1 ? str(" in ", micro_batches, " micro-batches") : "");
  line("steps", train.steps);
  line("tokens", tokens_per_step * train.steps, " (",
       short_count(double(tokens_per_step) * double(train.steps)), ")");
  line("FLOPs per token", short_count(training_flops_per_token(config.model, train.context)));
  line("memory: weights", gib(memory.weights));
  line("memory: masters", gib(memory.masters));
  line("memory: gradients", gib(memory.gradients));
  line("memory: moments", gib(memory.moments));
  line("memory: activations", gib(memory.activations), " (an estimate, per micro-batch)");
  line("memory: total", gib(memory.total()), " (an estimate)");
  out << "\n" << to_toml(config);
  return out.str();
}

}  // namespace sarissa::train
