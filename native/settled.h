// settled.h: a segment whose arrays stay where they are (settled.cpp).
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "steps.h"

namespace xd {

class Settled : public std::enable_shared_from_this<Settled> {
 public:
  // `given` is like what each evaluation is given.
  Settled(const std::shared_ptr<const Steps>& steps, const Arrays& given, const mx::Stream& stream);

  // Whether `given` lies as it did the first time, as far as that matters.
  bool fits(const Arrays& given) const;

  // Give `results`, which have no memory yet, what follows from `given`.
  void evaluate(const Arrays& given, Arrays& results);

 private:
  friend class Evaluation;

  // Tasks of settled steps that follow each other, or a live step.
  struct Part {
    std::vector<Tasks::Task> tasks;
    const Step* step = nullptr;
    const Input* inputs = nullptr;
    const Output* outputs = nullptr;
  };

  std::vector<bool> find_live_slots(const Arrays& given) const;
  bool settle(const Step& step, const Input* inputs, const Output* outputs);
  void add_live(const Step& step, const Input* inputs, const Output* outputs);
  bool gives_dense_results(const Input& input) const;
  void fix(uint32_t slot, const mx::Shape& shape, mx::Dtype dtype);

  const std::shared_ptr<const Steps> steps_;
  const mx::Stream stream_;
  const std::shared_ptr<Arena> arena_;
  Tasks building_;
  std::vector<bool> must_live_;                  // by slot
  std::vector<std::optional<mx::array>> fixed_;  // by slot; the others are live
  std::vector<Part> parts_;
};

}  // namespace xd
