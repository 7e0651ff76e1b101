// replay.cpp: a graph of MLX that was built once, built again.
//
// Theory of operation. A decode step's graph is the same at every step: the same primitives with the same constants. Only
// its leaves differ. Python calls the model once with placeholders for these leaves; a Tape is what can be reached from
// the results, down to the placeholders and to arrays that are there already (weights), in an order in which inputs
// come first. A Replay makes new arrays of the same primitives, as mx::compile does, but fuses nothing and bakes no
// number in: the bits are those of the graph that was recorded. A node takes 0.2 us here and 2 to 3 in Python.
// Nodes of a stage that the CPU computes are one node for MLX (segment.cpp).
//
// What the graph does not hold (a cache grows, a mask comes and goes) lies between two *stages*: each gives arrays to the
// caller, who computes with them what he likes, lazily, and brings others for the next stage.
//
// A placeholder has no primitive and no data, so that MLX refuses to evaluate whatever depends on it. A model that looks at
// a value therefore raises while it is recorded, and nothing of the recorded step's values can end in the tape.

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "segment.h"

namespace xd {

namespace {

struct Given {
  uint32_t number;
  mx::Shape shape;
  mx::Dtype dtype;
};

struct Stage {
  std::vector<Given> given;
  std::vector<Node> nodes;
  std::vector<uint32_t> wanted;
};

mx::array placeholder(const std::vector<int>& shape, mx::Dtype dtype) {
  return mx::array(mx::Shape(shape.begin(), shape.end()), dtype, nullptr, {});
}

bool is_placeholder(const mx::array& a) {
  return !a.has_primitive() && a.status() == mx::array::Status::unscheduled;
}

class Tape {
 public:
  // Each stage: the placeholders that it is given, and the arrays that are wanted of it.
  explicit Tape(const std::vector<std::pair<Arrays, Arrays>>& stages) {
    for (const auto& [given, wanted] : stages) {
      Stage& stage = stages_.emplace_back();
      for (const mx::array& a : given) {
        if (!is_placeholder(a)) throw std::invalid_argument("tape: what a stage is given must be placeholders");
        number(a);
        stage.given.push_back({numbers_.at(a.id()), a.shape(), a.dtype()});
      }
      for (const mx::array& a : wanted) record(a, stage);
      for (const mx::array& a : wanted) stage.wanted.push_back(numbers_.at(a.id()));
    }
    merge();
    numbers_.clear();  // ids mean something only while the arrays live
  }

  const std::vector<Stage>& stages() const {
    return stages_;
  }

  const mx::array& constant(uint32_t number) const {
    return constants_[number - CONSTANT];
  }

  // How many arrays a step makes or is given.
  size_t num_arrays() const {
    return num_arrays_;
  }

  // For the arrays of a step, empty between two: to ask malloc for so much took 35 us, in which it tidied up.
  std::vector<std::optional<mx::array>> memory;

  size_t num_nodes() const {
    size_t sum = 0;
    for (const Stage& stage : stages_) sum += stage.nodes.size();
    return sum;
  }

 private:
  void number(const mx::array& a) {
    if (numbers_.emplace(a.id(), static_cast<uint32_t>(num_arrays_)).second) num_arrays_++;
  }

  bool knows(const mx::array& a) const {
    return numbers_.count(a.id()) != 0;
  }

  // Add what `result` is made of, without recursion: a graph is as deep as the model has operations.
  void record(const mx::array& result, Stage& stage) {
    Arrays open = {result};
    while (!open.empty()) {
      const mx::array a = open.back();
      const size_t before = open.size();
      if (!knows(a) && a.has_primitive())
        for (const mx::array& input : a.inputs())
          if (!knows(input)) open.push_back(input);
      if (open.size() != before) continue;
      open.pop_back();
      if (!knows(a)) add(a, stage);
    }
  }

  void add(const mx::array& a, Stage& stage) {
    if (is_placeholder(a)) throw std::invalid_argument("tape: a placeholder is needed before it is given");
    if (!a.has_primitive()) {
      numbers_.emplace(a.id(), static_cast<uint32_t>(CONSTANT + constants_.size()));
      constants_.push_back(a);
      return;
    }
    if (std::strcmp(a.primitive().name(), "RandomBits") == 0)
      throw std::invalid_argument("tape: random numbers would be the same at every step");
    Node node{a.primitive_ptr(), {}, {}, {}, {}};
    for (const mx::array& input : a.inputs()) node.inputs.push_back(numbers_.at(input.id()));
    for (const mx::array& output : a.outputs()) {
      number(output);
      node.outputs.push_back(numbers_.at(output.id()));
      node.shapes.push_back(output.shape());
      node.dtypes.push_back(output.dtype());
    }
    stage.nodes.push_back(std::move(node));
  }

  void merge() {
    Uses uses;
    for (const Stage& stage : stages_) {
      for (const Node& node : stage.nodes)
        for (uint32_t input : node.inputs) uses[input]++;
      for (uint32_t number : stage.wanted) uses[number]++;
    }
    for (Stage& stage : stages_) stage.nodes = merged(stage.nodes, uses, constants_);
  }

  std::vector<Stage> stages_;
  Arrays constants_;
  std::unordered_map<uintptr_t, uint32_t> numbers_;
  size_t num_arrays_ = 0;
};

// One step. It holds every array of its graph until it is destroyed, which must be before the evaluation: MLX reuses
// the memory of an array that nobody holds.
class Replay {
 public:
  explicit Replay(Tape& tape) : tape_(tape) {
    arrays_.swap(tape.memory);
    arrays_.resize(tape.num_arrays());
  }

  Replay(const Replay&) = delete;

  ~Replay() {
    arrays_.clear();
    arrays_.swap(tape_.memory);
  }

  // Build the next stage: from what it is given to what is wanted of it.
  Arrays next(const Arrays& given) {
    if (next_ == tape_.stages().size()) throw std::invalid_argument("replay: no stage is left");
    const Stage& stage = tape_.stages()[next_++];
    take(given, stage);
    for (const Node& node : stage.nodes) build(node);
    Arrays wanted;
    for (uint32_t number : stage.wanted) wanted.push_back(at(number));
    return wanted;
  }

 private:
  const mx::array& at(uint32_t number) const {
    return number < CONSTANT ? *arrays_[number] : tape_.constant(number);
  }

  void take(const Arrays& given, const Stage& stage) {
    if (given.size() != stage.given.size()) throw std::invalid_argument("replay: a stage is given too few or too many");
    for (size_t i = 0; i < given.size(); i++) {
      const auto& [number, shape, dtype] = stage.given[i];
      if (given[i].shape() != shape || given[i].dtype() != dtype)
        throw std::invalid_argument("replay: an array has another shape or type than its placeholder");
      arrays_[number] = given[i];
    }
  }

  void build(const Node& node) {
    Arrays inputs;
    inputs.reserve(node.inputs.size());
    for (uint32_t number : node.inputs) inputs.push_back(at(number));
    if (node.shapes.size() == 1) {
      arrays_[node.outputs[0]].emplace(node.shapes[0], node.dtypes[0], node.primitive, std::move(inputs));
    } else {
      Arrays outputs = mx::array::make_arrays(node.shapes, node.dtypes, node.primitive, inputs);
      for (size_t i = 0; i < outputs.size(); i++) arrays_[node.outputs[i]] = std::move(outputs[i]);
    }
  }

  Tape& tape_;
  std::vector<std::optional<mx::array>> arrays_;
  size_t next_ = 0;
};

}  // namespace

void bind_replay(nb::module_& m) {
  m.def("placeholder", &placeholder, nb::arg("shape"), nb::arg("dtype"),
        "An array that stands for another one while a graph is recorded; it cannot be evaluated.");
  nb::class_<Tape>(m, "Tape", "A recorded graph, in stages (native/replay.cpp).")
      .def(nb::init<const std::vector<std::pair<Arrays, Arrays>>&>(), nb::arg("stages"),
           "Of each stage, the placeholders that it is given and the arrays that are wanted of it.")
      .def_prop_ro("num_nodes", &Tape::num_nodes);
  nb::class_<Replay>(m, "Replay", "One step of a Tape. It must be gone before its arrays are evaluated.")
      .def(nb::init<Tape&>(), nb::keep_alive<1, 2>(), nb::arg("tape"))
      .def("next", &Replay::next, nb::arg("given"), "Build the next stage: what is wanted of it from what it is given.");
}

}  // namespace xd
