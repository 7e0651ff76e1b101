// segment.cpp: nodes that follow each other as one node of the MLX graph.
//
// Theory of operation. A decode step has 45 nodes a layer. Half of them only change a shape, and MLX takes a microsecond
// or two to evaluate any: it looks for what a node needs, counts events, and keeps what a task reads alive by another
// task. A Segment calls the same primitives in the same order with the same inputs, so the bits stay; the order, and how
// long each array is needed, it knows from the recording. What our kernels have to do goes to the stream's thread in one
// message, until a primitive of MLX's comes that sends something itself.

#include "segment.h"

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>

#include "kernel_ops.h"

namespace xd {

namespace {

// A layer has about 36. MLX lets go of memory between two nodes, and waits there when too many tasks are open.
constexpr size_t MAX_STEPS = 64;

// What a primitive sends to the stream's thread when it is evaluated.
enum class Sends { SOMETHING, COPY_IF_SPARSE, NOTHING };

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

struct Input {
  uint32_t slot;  // or a constant's number, from CONSTANT on
  bool is_last;   // of all that need this array
};

struct Output {
  uint32_t slot;
  mx::Shape shape;
  mx::Dtype dtype;
};

struct Step {
  std::shared_ptr<mx::Primitive> primitive;
  KernelOp* kernel;  // the same, or nullptr if it is MLX's
  Sends sends;
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

// One evaluation of a segment.
class Evaluation {
 public:
  Evaluation(const std::shared_ptr<const Steps>& steps, const mx::Stream& stream)
      : steps_(steps), tasks_(stream), slots_(steps->num_slots) {}
  Evaluation(const Evaluation&) = delete;

  // What nobody has taken lives until all that was sent has been done; also if a primitive throws.
  ~Evaluation() {
    for (size_t slot = steps_->num_given; slot < slots_.size(); slot++)
      if (slots_[slot]) tasks_.keep(std::move(*slots_[slot]));
  }

  void run(const Arrays& in, Arrays& out) {
    for (size_t i = 0; i < in.size(); i++) slots_[i] = in[i];
    for (size_t i = 0; i < out.size(); i++) slots_[steps_->results[i]] = out[i];
    const Input* inputs = steps_->inputs.data();
    const Output* outputs = steps_->outputs.data();
    for (const Step& step : steps_->steps) {
      take(step, inputs, outputs);
      inputs += step.num_inputs, outputs += step.num_outputs;
    }
    tasks_.add([steps = steps_]() {});  // constants live until then
    tasks_.send();
    for (uint32_t result : steps_->results) slots_[result].reset();  // MLX keeps these
  }

 private:
  void take(const Step& step, const Input* inputs, const Output* outputs) {
    inputs_.clear();
    outputs_.clear();
    for (uint32_t i = 0; i < step.num_inputs; i++) inputs_.push_back(taken(inputs[i]));
    for (uint32_t i = 0; i < step.num_outputs; i++) outputs_.push_back(made(outputs[i], step));
    evaluate(step);
    for (uint32_t i = 0; i < step.num_inputs; i++)
      if (inputs[i].is_last && !lies_in_output(inputs_[i])) tasks_.keep(std::move(inputs_[i]));
  }

  // The last who needs an array holds it alone, and may write where it lies.
  mx::array taken(const Input& input) {
    if (input.slot >= CONSTANT) return steps_->constants[input.slot - CONSTANT];
    if (!input.is_last) return *slots_[input.slot];
    mx::array a = std::move(*slots_[input.slot]);
    slots_[input.slot].reset();
    return a;
  }

  // An array without memory; a result is there already.
  const mx::array& made(const Output& output, const Step& step) {
    auto& slot = slots_[output.slot];
    if (!slot) slot.emplace(output.shape, output.dtype, step.primitive, Arrays());
    return *slot;
  }

  void evaluate(const Step& step) {
    if (step.kernel) {
      step.kernel->add_to(tasks_, inputs_, outputs_[0]);
      return;
    }
    if (step.sends == Sends::SOMETHING || (step.sends == Sends::COPY_IF_SPARSE && !inputs_[0].flags().row_contiguous))
      tasks_.send();
    step.primitive->eval_cpu(inputs_, outputs_);
  }

  bool lies_in_output(const mx::array& a) const {
    for (const mx::array& output : outputs_)
      if (output.data_shared_ptr() == a.data_shared_ptr()) return true;
    return false;
  }

  const std::shared_ptr<const Steps> steps_;
  Tasks tasks_;
  std::vector<std::optional<mx::array>> slots_;
  Arrays inputs_, outputs_;  // of the step that is taken
};

class Segment : public mx::Primitive {
 public:
  Segment(const mx::Stream& stream, Steps steps)
      : mx::Primitive(stream), steps_(std::make_shared<const Steps>(std::move(steps))) {}

  const char* name() const override {
    return "Segment";
  }

  void eval_cpu(const Arrays& in, Arrays& out) override {
    Evaluation(steps_, stream()).run(in, out);
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("Segment: runs on a CPU stream only");
  }

 private:
  const std::shared_ptr<const Steps> steps_;
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
                            num_inputs, num_outputs});
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
