// segment.cpp: nodes that follow each other as one node of the MLX graph.
//
// Theory of operation. A decode step has 45 nodes a layer. Half of them only change a shape, and MLX takes a microsecond
// or two to evaluate any: it looks for what a node needs, counts events, and keeps what a task reads alive by another
// task. A Segment calls the same primitives in the same order with the same inputs, so the bits stay; the order, and how
// long each array is needed, it knows from the recording. settled.cpp says how it is evaluated.

#include "segment.h"

#include <algorithm>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>

#include "settled.h"

namespace xd {

namespace {

// A layer has about 36. MLX lets go of memory between two nodes, and waits there when too many tasks are open.
constexpr size_t MAX_STEPS = 64;

Sends what_is_sent(const mx::Primitive& primitive) {
  static const std::unordered_map<std::string, Sends> views = {
      {"Broadcast", Sends::NOTHING},      {"ExpandDims", Sends::NOTHING},     {"Slice", Sends::NOTHING},
      {"Split", Sends::NOTHING},          {"Squeeze", Sends::NOTHING},        {"StopGradient", Sends::NOTHING},
      {"Transpose", Sends::NOTHING},      {"Reshape", Sends::COPY_IF_SPARSE}, {"Flatten", Sends::COPY_IF_SPARSE},
      {"Unflatten", Sends::COPY_IF_SPARSE},
  };
  const auto found = views.find(primitive.name());
  return found == views.end() ? Sends::SOMETHING : found->second;
}

class Segment : public mx::Primitive {
 public:
  Segment(const mx::Stream& stream, Steps steps)
      : mx::Primitive(stream), steps_(std::make_shared<const Steps>(std::move(steps))) {}

  const char* name() const override {
    return "Segment";
  }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    if (!settled_ || !settled_->fits(in)) settled_ = std::make_shared<Settled>(steps_, in, stream());
    settled_->evaluate(in, out);
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("Segment: runs on a CPU stream only");
  }

 private:
  const std::shared_ptr<const Steps> steps_;
  std::shared_ptr<Settled> settled_;
};

// Makes one node of several.
class Merging {
 public:
  Merging(std::span<const Node> nodes, const Uses& uses, const Arrays& constants) : constants_(constants) {
    std::unordered_set<uint32_t> made;
    Uses inner;
    for (const Node& node : nodes) {
      for (uint32_t input : node.inputs)
        if (input < CONSTANT && !made.count(input)) give(input);
      for (uint32_t input : node.inputs) inner[input]++;
      made.insert(node.outputs.begin(), node.outputs.end());
    }
    steps_.num_given = slots_.size();
    for (const Node& node : nodes) add(node);
    for (const Node& node : nodes)
      for (size_t i = 0; i < node.outputs.size(); i++)
        if (const auto all = uses.find(node.outputs[i]); all != uses.end() && all->second > inner[node.outputs[i]])
          want(node, i);
    steps_.num_slots = slots_.size();
    find_last_inputs();
    merged_.primitive = std::make_shared<Segment>(nodes[0].primitive->stream(), std::move(steps_));
  }

  const Node& merged() const {
    return merged_;
  }

 private:
  void give(uint32_t number) {
    if (slots_.emplace(number, slots_.size()).second) merged_.inputs.push_back(number);
  }

  void add(const Node& node) {
    for (uint32_t number : node.inputs) {
      uint32_t slot = CONSTANT + steps_.constants.size();
      if (number < CONSTANT)
        slot = slots_.at(number);
      else
        steps_.constants.push_back(constants_[number - CONSTANT]);
      steps_.inputs.push_back({slot, false});
    }
    for (size_t i = 0; i < node.outputs.size(); i++) {
      const uint32_t slot = slots_.size();
      slots_.emplace(node.outputs[i], slot);
      steps_.outputs.push_back({slot, node.shapes[i], node.dtypes[i]});
    }
    const uint32_t num_inputs = node.inputs.size(), num_outputs = node.outputs.size();
    steps_.steps.push_back({node.primitive, dynamic_cast<KernelOp*>(node.primitive.get()), what_is_sent(*node.primitive),
                            twin_of(*node.primitive), num_inputs, num_outputs});
  }

  void want(const Node& node, size_t i) {
    steps_.results.push_back(slots_.at(node.outputs[i]));
    merged_.outputs.push_back(node.outputs[i]);
    merged_.shapes.push_back(node.shapes[i]);
    merged_.dtypes.push_back(node.dtypes[i]);
  }

  // What is given, and results, are others' as well.
  void find_last_inputs() {
    std::vector<bool> is_needed(slots_.size(), false);
    std::fill_n(is_needed.begin(), steps_.num_given, true);
    for (uint32_t result : steps_.results) is_needed[result] = true;
    for (auto input = steps_.inputs.rbegin(); input != steps_.inputs.rend(); ++input)
      if (input->slot < CONSTANT && !is_needed[input->slot]) input->is_last = is_needed[input->slot] = true;
  }

  const Arrays& constants_;
  std::unordered_map<uint32_t, uint32_t> slots_;  // by number
  Steps steps_;
  Node merged_;
};

bool go_together(const Node& a, const Node& b) {
  return a.primitive->device() == mx::Device::cpu && a.primitive->stream() == b.primitive->stream();
}

}  // namespace

std::vector<Node> merged(const std::vector<Node>& nodes, const Uses& uses, const Arrays& constants) {
  std::vector<Node> found;
  for (size_t begin = 0, end; begin < nodes.size(); begin = end) {
    for (end = begin + 1; end < nodes.size() && end - begin < MAX_STEPS && go_together(nodes[begin], nodes[end]);) end++;
    const bool is_alone = end == begin + 1;
    found.push_back(is_alone ? nodes[begin] : Merging({&nodes[begin], end - begin}, uses, constants).merged());
  }
  return found;
}

}  // namespace xd
