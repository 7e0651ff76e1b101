// steps.h: the nodes of a segment (segment.cpp), as Settled evaluates them (settled.cpp).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_ops.h"
#include "twins.h"

namespace xd {

// What a primitive sends to the stream's thread when it is evaluated.
enum class Sends { SOMETHING, COPY_IF_SPARSE, NOTHING };

struct Input {
  uint32_t slot;  // or a constant's number, from CONSTANT on
  bool is_last;   // of all that need this array
};

struct Output {
  uint32_t slot;
  mx::Shape shape;
  mx::Dtype dtype;

  size_t num_bytes() const {
    size_t bytes = mx::size_of(dtype);
    for (auto n : shape) bytes *= n;
    return bytes;
  }
};

struct Step {
  std::shared_ptr<mx::Primitive> primitive;
  KernelOp* kernel;  // the same, or nullptr if it is MLX's
  Sends sends;
  Twin twin;
  uint32_t num_inputs, num_outputs;
};

// The arrays of a segment lie in slots: first what it is given, then what each step makes. Inputs and outputs of all steps
// are in two rows, because weights have driven all of this out of the processor's cache since the last time.
struct Steps {
  std::vector<Step> steps;
  std::vector<Input> inputs;
  std::vector<Output> outputs;
  size_t num_given = 0, num_slots = 0;
  std::vector<uint32_t> results;
  Arrays constants;
};

}  // namespace xd
