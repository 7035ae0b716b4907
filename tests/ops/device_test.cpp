#include "sarissa/ops/device.h"

#include <gtest/gtest.h>

#include "sarissa/base/error.h"

namespace sarissa {
namespace {

TEST(Device, ParsesNamesAndRefusesOthers) {
  EXPECT_TRUE(ops::parse_device("cpu").is_cpu());
  EXPECT_THROW(ops::parse_device("gpu"), UsageError);
  EXPECT_THROW(ops::parse_device("xla"), UsageError);
}

TEST(Device, SaysWhyThereIsNoGpu) {
  EXPECT_EQ(ops::cuda_available(), ops::cuda_unavailable_reason().empty());
}

}  // namespace
}  // namespace sarissa
