// settled.cpp: a segment that is evaluated again and again.
//
// Theory of operation. At each step the same kernels compute arrays of the same shapes. To evaluate a segment anew means to
// ask malloc for each array, to make an mx::array of it and to fill in a kernel's pointers: one to three microseconds a node,
// more than the kernel itself takes with many. So the first evaluation settles where arrays lie, and keeps the tasks; each
// one does these tasks again. All segments of a stream share one arena, for their tasks run one after the other. What a
// segment is given is copied to where it is expected, and what it gives from where it was computed.
//
// Not every step can settle. A primitive of MLX's sends tasks with memory of its own, and large arrays are not worth a copy,
// nor to be kept. Such a step is *live*: it is evaluated each time, with arrays of that time. What small arrays it makes are
// copied to fixed ones, so that what follows can be settled.

#include "settled.h"

#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace xd {

namespace {

constexpr size_t MOST_COPIED = 64 << 10;  // bytes of an array: a copy in the cache takes as long as a live step
constexpr size_t MOST_KEPT = 4 << 20;

std::shared_ptr<Arena> arena_of(const mx::Stream& stream) {
  static std::mutex mutex;
  static std::unordered_map<int, std::weak_ptr<Arena>> arenas;
  const std::lock_guard lock(mutex);
  auto& known = arenas[stream.index];
  auto arena = known.lock();
  if (!arena) known = arena = std::make_shared<Arena>();
  return arena;
}

bool is_view(const Step& step) {
  return step.sends != Sends::SOMETHING;
}

}  // namespace

Settled::Settled(const std::shared_ptr<const Steps>& steps, const Arrays& given, const mx::Stream& stream)
    : steps_(steps),
      stream_(stream),
      arena_(arena_of(stream)),
      building_(stream, *arena_),
      must_live_(find_live_slots(given)),
      fixed_(steps->num_slots) {
  arena_->arrays.rewind();
  for (size_t slot = 0; slot < given.size(); slot++)
    if (!must_live_[slot]) fix(slot, given[slot].shape(), given[slot].dtype());
  const Input* inputs = steps_->inputs.data();
  const Output* outputs = steps_->outputs.data();
  for (const Step& step : steps_->steps) {
    if (!settle(step, inputs, outputs)) add_live(step, inputs, outputs);
    inputs += step.num_inputs, outputs += step.num_outputs;
  }
}

// Large arrays; those whose copy would lie otherwise, since MLX's products round as their inputs lie; and what large results
// are views of, for no result may lie in the arena.
std::vector<bool> Settled::find_live_slots(const Arrays& given) const {
  std::vector<bool> live(steps_->num_slots, false), is_result(steps_->num_slots, false);
  for (uint32_t slot : steps_->results) is_result[slot] = true;
  for (size_t slot = 0; slot < given.size(); slot++)
    live[slot] = given[slot].nbytes() > MOST_COPIED || !given[slot].flags().row_contiguous;
  for (const Output& output : steps_->outputs)
    live[output.slot] = output.num_bytes() > (is_result[output.slot] ? MOST_COPIED : MOST_KEPT);
  const Input* inputs = steps_->inputs.data() + steps_->inputs.size();
  const Output* outputs = steps_->outputs.data() + steps_->outputs.size();
  for (auto step = steps_->steps.rbegin(); step != steps_->steps.rend(); ++step) {
    inputs -= step->num_inputs, outputs -= step->num_outputs;
    if (!is_view(*step) || inputs[0].slot >= CONSTANT) continue;
    for (uint32_t i = 0; i < step->num_outputs; i++)
      if (live[outputs[i].slot]) live[inputs[0].slot] = true;
  }
  return live;
}

void Settled::fix(uint32_t slot, const mx::Shape& shape, mx::Dtype dtype) {
  building_.allocate(fixed_[slot].emplace(shape, dtype, nullptr, Arrays()));
}

// False, with nothing changed, if the step must be live.
bool Settled::settle(const Step& step, const Input* inputs, const Output* outputs) {
  Arrays in, out;
  for (uint32_t i = 0; i < step.num_inputs; i++) {
    const uint32_t slot = inputs[i].slot;
    if (slot < CONSTANT && !fixed_[slot]) return false;
    in.push_back(slot < CONSTANT ? *fixed_[slot] : steps_->constants[slot - CONSTANT]);
  }
  for (uint32_t i = 0; i < step.num_outputs; i++) {
    if (must_live_[outputs[i].slot]) return false;
    out.emplace_back(outputs[i].shape, outputs[i].dtype, step.primitive, Arrays());
  }
  arena_->scratch.rewind();
  if (step.kernel)
    step.kernel->add_to(building_, in, out[0]);
  else if (step.sends == Sends::NOTHING || (step.sends == Sends::COPY_IF_SPARSE && in[0].flags().row_contiguous))
    step.primitive->eval_cpu(in, out);
  else if (!add_twin(step.twin, *step.primitive, in, out[0], building_))
    return false;
  for (uint32_t i = 0; i < step.num_outputs; i++) fixed_[outputs[i].slot] = out[i];
  if (parts_.empty() || parts_.back().step) parts_.emplace_back();
  for (auto& task : building_.take()) parts_.back().tasks.push_back(std::move(task));
  return true;
}

void Settled::add_live(const Step& step, const Input* inputs, const Output* outputs) {
  parts_.push_back({{}, &step, inputs, outputs});
  for (uint32_t i = 0; i < step.num_inputs; i++)
    if (!gives_dense_results(inputs[i])) return;
  for (uint32_t i = 0; i < step.num_outputs; i++)
    if (!must_live_[outputs[i].slot] && outputs[i].num_bytes() <= MOST_COPIED)
      fix(outputs[i].slot, outputs[i].shape, outputs[i].dtype);
}

// MLX lays results as an input lies, if that has no gaps.
bool Settled::gives_dense_results(const Input& input) const {
  const bool is_constant = input.slot >= CONSTANT;
  if (!is_constant && !fixed_[input.slot]) return false;
  const auto flags = (is_constant ? steps_->constants[input.slot - CONSTANT] : *fixed_[input.slot]).flags();
  return flags.row_contiguous || !flags.contiguous;
}

// One evaluation, with its live arrays.
class Evaluation {
 public:
  explicit Evaluation(Settled& settled)
      : settled_(settled), steps_(*settled.steps_), tasks_(settled.stream_), slots_(steps_.num_slots) {}
  Evaluation(const Evaluation&) = delete;

  // All of it lives until what was sent has been done; also if a primitive throws.
  ~Evaluation() {
    for (size_t slot = steps_.num_given; slot < slots_.size(); slot++)
      if (slots_[slot]) tasks_.keep(std::move(*slots_[slot]));
    tasks_.add([settled = settled_.shared_from_this()]() {});
    tasks_.send();
  }

  void run(const Arrays& given, Arrays& results) {
    for (size_t slot = 0; slot < given.size(); slot++)
      if (const auto& fixed = settled_.fixed_[slot])
        copy_densely(given[slot], fixed_memory(*fixed), tasks_);
      else
        slots_[slot] = given[slot];
    for (size_t i = 0; i < results.size(); i++)
      if (!settled_.fixed_[steps_.results[i]]) slots_[steps_.results[i]] = results[i];
    for (const Settled::Part& part : settled_.parts_) {
      if (part.step)
        take(*part.step, part.inputs, part.outputs);
      else
        tasks_.add([&part]() {
          for (const auto& task : part.tasks) task();
        });
    }
    for (size_t i = 0; i < results.size(); i++) give(steps_.results[i], results[i]);
  }

 private:
  static char* fixed_memory(const mx::array& fixed) {
    return const_cast<char*>(fixed.data<char>());
  }

  void take(const Step& step, const Input* inputs, const Output* outputs) {
    inputs_.clear();
    outputs_.clear();
    for (uint32_t i = 0; i < step.num_inputs; i++) inputs_.push_back(taken(inputs[i]));
    for (uint32_t i = 0; i < step.num_outputs; i++) outputs_.push_back(made(outputs[i], step));
    evaluate(step);
    for (uint32_t i = 0; i < step.num_inputs; i++)
      if (inputs[i].is_last && !lies_in_output(inputs_[i])) tasks_.keep(std::move(inputs_[i]));
    for (uint32_t i = 0; i < step.num_outputs; i++)
      if (const auto& fixed = settled_.fixed_[outputs[i].slot]) {
        copy_densely(outputs_[i], fixed_memory(*fixed), tasks_);
        tasks_.keep(std::move(outputs_[i]));
      }
  }

  // The last who needs a live array holds it alone, and may write where it lies.
  mx::array taken(const Input& input) {
    if (input.slot >= CONSTANT) return steps_.constants[input.slot - CONSTANT];
    if (const auto& fixed = settled_.fixed_[input.slot]) return *fixed;
    if (!input.is_last) return *slots_[input.slot];
    mx::array a = std::move(*slots_[input.slot]);
    slots_[input.slot].reset();
    return a;
  }

  // An array without memory; a result is there already.
  mx::array made(const Output& output, const Step& step) {
    auto& slot = slots_[output.slot];
    if (slot) return *slot;
    mx::array a(output.shape, output.dtype, step.primitive, Arrays());
    if (!settled_.fixed_[output.slot]) slot = a;
    return a;
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

  // MLX keeps a result, so it must not lie in the arena. A copy lies as what it was made of, if that has no gaps.
  void give(uint32_t slot, mx::array& result) {
    const auto& fixed = settled_.fixed_[slot];
    if (!fixed) slots_[slot].reset();
    const mx::array from = fixed ? *fixed : result;
    if (!settled_.arena_->arrays.has(from)) {
      if (fixed) result.copy_shared_buffer(from);  // of a constant
      return;
    }
    mx::array own(result.shape(), result.dtype(), nullptr, {});
    if (from.flags().contiguous && from.data_size() == from.size()) {
      tasks_.allocate(own, from.data_size(), from.strides(), from.flags());
      tasks_.add([from = from.data<char>(), to = own.data<char>(), bytes = from.nbytes()]() { std::memcpy(to, from, bytes); });
    } else {
      tasks_.allocate(own);
      copy_densely(from, own.data<char>(), tasks_);
    }
    result.copy_shared_buffer(own);
  }

  Settled& settled_;
  const Steps& steps_;
  Tasks tasks_;
  std::vector<std::optional<mx::array>> slots_;
  Arrays inputs_, outputs_;  // of the step that is taken
};

bool Settled::fits(const Arrays& given) const {
  for (size_t slot = 0; slot < given.size(); slot++)
    if (fixed_[slot] && !given[slot].flags().row_contiguous) return false;
  return true;
}

void Settled::evaluate(const Arrays& given, Arrays& results) {
  Evaluation(*this).run(given, results);
}

}  // namespace xd
