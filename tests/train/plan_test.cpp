#include "sarissa/train/plan.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>

#include "sarissa/model/decoder.h"
#include "sarissa/train/hardware.h"
#include "tests/support/files.h"

namespace sarissa::train {
namespace {

namespace fs = std::filesystem;

RunConfig small() {
  RunConfig config;
  config.model.pattern = "ATT SWA LI";
  config.model.dim = 64;
  config.model.heads = 4;
  config.data.train = "corpus.txt";
  config.train.device = "cpu";
  return config;
}

TEST(Plan, CountsBytes) {
  RunConfig config = small();
  const int64_t n = model::parameter_count(config.model);
  const MemoryEstimate fp32 = estimate_memory(config, 4);
  EXPECT_EQ(fp32.weights, 4 * n);
  EXPECT_EQ(fp32.masters, 0);
  EXPECT_EQ(fp32.gradients, 4 * n);
  EXPECT_EQ(fp32.moments, 8 * n);
  const MemoryEstimate bf16 = estimate_memory(config, 2);
  EXPECT_EQ(bf16.weights, 2 * n);
  EXPECT_EQ(bf16.masters, 4 * n);
  EXPECT_EQ(bf16.gradients, 6 * n);
  EXPECT_EQ(bf16.total(),
            bf16.weights + bf16.masters + bf16.gradients + bf16.moments + bf16.activations);
  config.train.micro_batch = 1;
  EXPECT_LT(estimate_memory(config, 2).activations, bf16.activations / 8);
}

TEST(Plan, DescribesARun) {
  RunConfig config = small();
  config.train.micro_batch = 4;
  const std::string text = describe_run(config);
  for (const char* part : {"ATT", "SWA", "LI", "parameters", "float32", "cpu", "memory: total",
                           "8192 = 16 sequences of 512 in 4 micro-batches", "[optim]"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

// 40 billion parameters would take 80 GB: the report must not make them.
TEST(Plan, Describes40BillionParametersWithoutAllocatingThem) {
  RunConfig config = small();
  config.model = model::preset("evo2-40b");
  config.train.dtype = "bfloat16";
  rusage before{}, after{};
  getrusage(RUSAGE_SELF, &before);
  const std::string text = describe_run(config);
  getrusage(RUSAGE_SELF, &after);
  EXPECT_NE(text.find("(41.1G)"), std::string::npos) << text;
  EXPECT_LT(after.ru_maxrss - before.ru_maxrss, 50'000) << "KiB";
}

TEST(Plan, NamesADeviceThatIsNotHere) {
  RunConfig config = small();
  config.train.device = "cuda:63";
  EXPECT_NE(describe_run(config).find("cuda:63"), std::string::npos);
}

TEST(Plan, EveryConfigurationInTheTreeLoads) {
  int64_t count = 0;
  for (const auto& entry : fs::directory_iterator(test::source_root() + "/configs")) {
    if (entry.path().extension() != ".toml") continue;
    const RunConfig config = load_run_config(entry.path().string(), {});
    const std::string text = describe_run(config);
    EXPECT_NE(text.find("memory: total"), std::string::npos) << entry.path();
    ++count;
  }
  EXPECT_GE(count, 6);
}

TEST(Flops, CountProductsAndAttention) {
  model::ModelConfig config = small().model;
  config.swa_window = 16;
  const double n = double(model::parameter_count(config));
  // A token of 64 sees 32.5 tokens on average; in a window of 16: (136 + 48 * 16) / 64.
  const double attended = 32.5 + (136.0 + 48 * 16) / 64;
  EXPECT_DOUBLE_EQ(training_flops_per_token(config, 64), 6 * n + 12 * 64 * attended);
  config.tie_embeddings = false;
  // The second table is the head; the first is only looked up.
  EXPECT_DOUBLE_EQ(training_flops_per_token(config, 64), 6 * n + 12 * 64 * attended);
}

TEST(Hardware, KnowsPeaksByName) {
  EXPECT_EQ(peak_bf16_flops("NVIDIA H100 80GB HBM3"), 989e12);
  EXPECT_EQ(peak_bf16_flops("NVIDIA H100 PCIe"), 756e12);
  EXPECT_EQ(peak_bf16_flops("NVIDIA A100-SXM4-80GB"), 312e12);
  EXPECT_EQ(peak_bf16_flops("cpu"), std::nullopt);
  EXPECT_EQ(device_name(at::kCPU), "cpu");
  EXPECT_GT(peak_memory_bytes(at::kCPU), 1 << 20);
}

}  // namespace
}  // namespace sarissa::train
