// What must cross ranks when each holds a part of the same sequences (context parallelism): the
// state in which a part begins. The model knows this interface alone; sarissa/parallel implements
// it.
#pragma once

#include <cstdint>

#include "sarissa/model/state.h"

namespace sarissa::model {

/// Links the parts of a sequence in their order. Every mixer's state is exact at any cut, so
/// handing the left part's end state to the right part makes the parts equal to the whole. Tensors
/// may carry gradients.
class SequenceContext {
 public:
  virtual ~SequenceContext() = default;

  /// Whether there are other parts. If so every call below is made, in block order, once per block.
  virtual bool split() const = 0;
  /// Tokens of the sequences in the parts to the left.
  virtual int64_t offset() const = 0;
  /// Replaces `state` by the left part's end state of that block; leaves it in the first part.
  /// Called after the mixer's input projection, so that the projection overlaps the wait.
  virtual void receive(int64_t block, LayerState& state) = 0;
  /// Hands this part's end state to the right; does nothing in the last part.
  virtual void send(int64_t block, const LayerState& state) = 0;

  /// The whole sequence is here.
  static SequenceContext& alone();
};

}  // namespace sarissa::model
