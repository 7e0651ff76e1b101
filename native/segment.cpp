// segment.cpp: nodes that follow each other as one node of the MLX graph.
//
// Theory of operation. MLX evaluates a node in a microsecond or two: it looks for what the node needs, counts events, keeps
// what its task reads alive by a task of its own. A decode step has 45 nodes a layer, most of which compute for less than
// that or only change a shape. A Segment calls the same primitives in the same order with the same inputs, so the bits
// stay, but it knows their order and how long each array is needed from the recording.

#include "segment.h"

#include "kernel_ops.h"

#include <optional>

namespace xd {

namespace {

using Slots = std::vector<std::optional<mx::array>>;

struct Input {
  uint32_t slot;  // or CONSTANT and more
  bool is_last;   // of the steps that need it
};

// What a primitive's eval_cpu sends to the stream's thread itself.
enum class Sends { SOMETHING, NOTHING, COPY_IF_SPARSE };

Sends what_sends(const mx::Primitive& primitive) {
  static const std::unordered_map<std::string, Sends> known = {
      {"Broadcast", Sends::NOTHING},     {"ExpandDims", Sends::NOTHING},        {"Slice", Sends::NOTHING},
      {"Split", Sends::NOTHING},         {"Squeeze", Sends::NOTHING},           {"StopGradient", Sends::NOTHING},
      {"Transpose", Sends::NOTHING},     {"Reshape", Sends::COPY_IF_SPARSE},    {"Flatten", Sends::COPY_IF_SPARSE},
      {"Unflatten", Sends::COPY_IF_SPARSE},
  };
  const auto found = known.find(primitive.name());
  return found == known.end() ? Sends::SOMETHING : found->second;
}

struct Step {
  std::shared_ptr<mx::Primitive> primitive;
  KernelOp* kernel;  // the same, if it is one
  Sends sends;
  std::vector<Input> inputs;
  std::vector<uint32_t> outputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
};

// What a Segment computes. Slots are the arrays in it: what it is given, then what its steps make.
struct Steps {
  std::vector<Step> steps;
  size_t num_given = 0, num_slots = 0;
  std::vector<uint32_t> results;  // the slots of the outputs
  Arrays constants;
};

class Segment : public mx::Primitive {
 public:
  Segment(const mx::Stream& stream, Steps steps) : mx::Primitive(stream), steps_(std::move(steps)) {}

  const char* name() const override {
    return "Segment";
  }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    Tasks tasks(stream());
    Kept kept(tasks, steps_.num_slots);
    Slots& slots = kept.slots;
    for (size_t i = 0; i < in.size(); i++) slots[i] = in[i];
    for (size_t i = 0; i < out.size(); i++) slots[steps_.results[i]] = out[i];
    for (const Step& step : steps_.steps) take(step, slots, tasks);
    tasks.send();
    // MLX keeps these.
    for (size_t i = 0; i < in.size(); i++) slots[i].reset();
    for (uint32_t result : steps_.results) slots[result].reset();
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("Segment: runs on a CPU stream only");
  }

 private:
  // Whatever is in a slot at the end lives until the tasks that were sent before have run.
  struct Kept {
    Tasks& tasks;
    Slots slots;

    Kept(Tasks& tasks, size_t num_slots) : tasks(tasks), slots(num_slots) {}
    Kept(const Kept&) = delete;

    ~Kept() {
      for (auto& slot : slots)
        if (slot) tasks.keep(std::move(*slot));
    }
  };

  void take(const Step& step, Slots& slots, Tasks& tasks) const {
    Arrays inputs, outputs;
    inputs.reserve(step.inputs.size());
    for (const Input& input : step.inputs) {
      if (input.slot >= CONSTANT) {
        inputs.push_back(steps_.constants[input.slot - CONSTANT]);
      } else if (input.is_last) {  // nobody else holds it: the primitive may write where it lies
        inputs.push_back(std::move(*slots[input.slot]));
        slots[input.slot].reset();
      } else {
        inputs.push_back(*slots[input.slot]);
      }
    }
    outputs.reserve(step.outputs.size());
    for (size_t i = 0; i < step.outputs.size(); i++) {
      auto& slot = slots[step.outputs[i]];
      if (!slot) slot.emplace(step.shapes[i], step.dtypes[i], step.primitive, Arrays());
      outputs.push_back(*slot);
    }
    if (step.kernel) {
      step.kernel->add_to(tasks, inputs, outputs[0]);
    } else {
      if (step.sends == Sends::SOMETHING || (step.sends == Sends::COPY_IF_SPARSE && !inputs[0].flags().row_contiguous))
        tasks.send();
      step.primitive->eval_cpu(inputs, outputs);
    }
    for (size_t i = 0; i < inputs.size(); i++)
      if (step.inputs[i].is_last && !is_in(inputs[i], outputs)) tasks.keep(std::move(inputs[i]));
  }

  // Does one of them lie in the memory of `a`?
  static bool is_in(const mx::array& a, const Arrays& outputs) {
    for (const mx::array& output : outputs)
      if (output.data_shared_ptr() == a.data_shared_ptr()) return true;
    return false;
  }

  const Steps steps_;
};

bool is_on_cpu(const Node& node) {
  return node.primitive->device() == mx::Device::cpu;
}

class Merging {
 public:
  Merging(const Uses& uses, const Arrays& constants) : uses_(uses), constants_(constants) {}

  // Nodes [begin, end) as one.
  Node merge(const Node* begin, const Node* end) {
    Node node;
    for (const Node* each = begin; each != end; each++)
      for (uint32_t input : each->inputs)
        if (input < CONSTANT) inner_uses_[input]++;
    for (const Node* each = begin; each != end; each++)
      for (uint32_t output : each->outputs) made_.emplace(output, 0);
    for (const Node* each = begin; each != end; each++)
      for (uint32_t input : each->inputs)
        if (input < CONSTANT && !made_.count(input) && slots_.emplace(input, slots_.size()).second)
          node.inputs.push_back(input);
    steps_.num_given = slots_.size();
    for (const Node* each = begin; each != end; each++) add(*each, node);
    set_last();
    steps_.num_slots = slots_.size();
    node.primitive = std::make_shared<Segment>(begin->primitive->stream(), std::move(steps_));
    return node;
  }

 private:
  void add(const Node& from, Node& node) {
    auto* kernel = dynamic_cast<KernelOp*>(from.primitive.get());
    Step step{from.primitive, kernel, what_sends(*from.primitive), {}, {}, from.shapes, from.dtypes};
    for (uint32_t input : from.inputs) step.inputs.push_back({input < CONSTANT ? slots_.at(input) : constant(input), false});
    for (size_t i = 0; i < from.outputs.size(); i++) {
      const uint32_t output = from.outputs[i], slot = slots_.size();
      slots_.emplace(output, slot);
      step.outputs.push_back(slot);
      const auto all = uses_.find(output);
      if (all == uses_.end() || all->second == inner_uses_[output]) continue;
      steps_.results.push_back(slot);
      node.outputs.push_back(output);
      node.shapes.push_back(from.shapes[i]);
      node.dtypes.push_back(from.dtypes[i]);
    }
    steps_.steps.push_back(std::move(step));
  }

  uint32_t constant(uint32_t number) {
    steps_.constants.push_back(constants_[number - CONSTANT]);
    return CONSTANT + steps_.constants.size() - 1;
  }

  // Which input is the last of its array; what the segment is given, and its results, are not its own.
  void set_last() {
    std::vector<bool> is_needed(slots_.size(), false);
    for (size_t slot = 0; slot < steps_.num_given; slot++) is_needed[slot] = true;
    for (uint32_t result : steps_.results) is_needed[result] = true;
    for (auto step = steps_.steps.rbegin(); step != steps_.steps.rend(); ++step)
      for (auto input = step->inputs.rbegin(); input != step->inputs.rend(); ++input)
        if (input->slot < CONSTANT && !is_needed[input->slot]) input->is_last = is_needed[input->slot] = true;
  }

  const Uses& uses_;
  const Arrays& constants_;
  Uses inner_uses_;
  std::unordered_map<uint32_t, uint32_t> slots_, made_;
  Steps steps_;
};

}  // namespace

std::vector<Node> merged(const std::vector<Node>& nodes, const Uses& uses, const Arrays& constants) {
  std::vector<Node> found;
  for (size_t begin = 0, end; begin < nodes.size(); begin = end) {
    for (end = begin + 1; end < nodes.size() && is_on_cpu(nodes[begin]) && is_on_cpu(nodes[end]) &&
                          nodes[begin].primitive->stream() == nodes[end].primitive->stream();)
      end++;
    found.push_back(end == begin + 1 ? nodes[begin] : Merging(uses, constants).merge(&nodes[begin], &nodes[end]));
  }
  return found;
}

}  // namespace xd
