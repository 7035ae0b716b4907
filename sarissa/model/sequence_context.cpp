#include "sarissa/model/sequence_context.h"

namespace sarissa::model {
namespace {

class Alone final : public SequenceContext {
 public:
  bool split() const override { return false; }
  int64_t offset() const override { return 0; }
  void receive(int64_t, LayerState&) override {}
  void send(int64_t, const LayerState&) override {}
};

}  // namespace

SequenceContext& SequenceContext::alone() {
  static Alone context;
  return context;
}

}  // namespace sarissa::model
