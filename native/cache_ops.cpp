// cache_ops.cpp: a token's keys and values on their way into mlx-lm's caches, without Python.
//
// Theory of operation. A decode step appends one token to each sequence's cache of each layer. A plain cache (mlx-lm's
// KVCache) is three attributes: keys and values [1, heads, room, dim], and how many tokens of the room are taken (offset).
// While there is room, appending is one operation of the graph and three new attributes. Without Python that takes 17 us less
// a layer for one sequence, 38 for sixteen (bench/LOG.md). Whatever is not so plain is left to mlx-lm: then None is given, and
// nothing has changed.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "kernel_ops.h"

namespace xd {

namespace {

using Arrays = std::vector<mx::array>;

// An attribute's name, kept as long as the process lives.
nb::handle attribute(const char* name) {
  PyObject* interned = PyUnicode_InternFromString(name);
  if (!interned) throw nb::python_error();
  return interned;
}

// One sequence's cache, and what it holds.
class Plain {
 public:
  // None if it is not of the class `kind`, or has no room for another token of this type.
  static std::optional<Plain> of(nb::handle cache, nb::handle kind, const mx::array& added) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(cache.ptr())) != kind.ptr()) return std::nullopt;
    const nb::object keys = cache.attr(KEYS), values = cache.attr(VALUES);
    if (!nb::isinstance<mx::array>(keys) || !nb::isinstance<mx::array>(values)) return std::nullopt;
    Plain plain{cache, nb::cast<mx::array>(keys), nb::cast<mx::array>(values), nb::cast<int>(cache.attr(OFFSET))};
    const bool has_room = plain.keys_.ndim() == 4 && plain.length_ >= 0 && plain.length_ < plain.keys_.shape(2);
    if (!has_room || plain.keys_.dtype() != added.dtype() || plain.values_.dtype() != added.dtype()) return std::nullopt;
    return plain;
  }

  const mx::array& keys() const {
    return keys_;
  }

  const mx::array& values() const {
    return values_;
  }

  int length() const {
    return length_;
  }

  // Let the cache hold these, which are one token more.
  void grow(const mx::array& keys, const mx::array& values) const {
    nb::setattr(cache_, KEYS, nb::cast(keys));
    nb::setattr(cache_, VALUES, nb::cast(values));
    nb::setattr(cache_, OFFSET, nb::int_(length_ + 1));
  }

 private:
  Plain(nb::handle cache, mx::array keys, mx::array values, int length)
      : cache_(cache), keys_(std::move(keys)), values_(std::move(values)), length_(length) {}

  inline static const nb::handle KEYS = attribute("keys"), VALUES = attribute("values"), OFFSET = attribute("offset");
  nb::handle cache_;
  mx::array keys_, values_;
  int length_;
};

// All of `caches`, if each of them has room for a token of keys k and values v [n, heads, 1, dim].
std::optional<std::vector<Plain>> all_plain(const nb::list& caches, nb::handle kind, const mx::array& k,
                                            const mx::array& v) {
  if (k.ndim() != 4 || k.shape(2) != 1 || v.dtype() != k.dtype()) return std::nullopt;
  std::vector<Plain> all;
  all.reserve(caches.size());
  for (nb::handle cache : caches) {
    auto plain = Plain::of(cache, kind, k);
    if (!plain) return std::nullopt;
    all.push_back(std::move(*plain));
  }
  return all;
}

// Row `added` [1, heads, 1, dim] as number `at` of `room`, as MLX's indexing does it.
mx::array updated(const mx::array& room, const mx::array& added, int at) {
  mx::Shape start(4, 0), stop = room.shape();
  start[2] = at;
  stop[2] = at + 1;
  return mx::slice_update(room, added, std::move(start), std::move(stop));
}

mx::array first(const mx::array& room, int count) {
  mx::Shape stop = room.shape();
  if (count == stop[2]) return room;
  stop[2] = count;
  return mx::slice(room, mx::Shape(4, 0), std::move(stop));
}

}  // namespace

std::optional<mx::array> append_attention_to(const Kernels& kernels, const nb::list& caches, nb::handle kind,
                                             const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                                             const std::optional<mx::array>& sinks) {
  const auto all = q.dtype() == k.dtype() ? all_plain(caches, kind, k, v) : std::nullopt;
  if (!all) return std::nullopt;
  Arrays keys, values;
  std::vector<int> lengths;
  for (const Plain& plain : *all) {
    keys.push_back(plain.keys());
    values.push_back(plain.values());
    lengths.push_back(plain.length());
  }
  const Arrays made = append_attention(kernels, q, k, v, keys, values, lengths, scale, sinks);
  for (size_t i = 0; i < all->size(); i++) (*all)[i].grow(made[1 + i], made[1 + all->size() + i]);
  return made[0];
}

std::optional<std::pair<Arrays, Arrays>> append(const nb::list& caches, nb::handle kind, const mx::array& k,
                                                const mx::array& v) {
  const auto all = all_plain(caches, kind, k, v);
  if (!all || all->empty()) return std::nullopt;
  const int n = static_cast<int>(all->size());
  const Arrays rows_k = mx::split(k, n, 0), rows_v = mx::split(v, n, 0);
  Arrays grown_k, grown_v;
  std::pair<Arrays, Arrays> fetched;
  for (int i = 0; i < n; i++) {
    const Plain& plain = (*all)[i];
    grown_k.push_back(updated(plain.keys(), rows_k[i], plain.length()));
    grown_v.push_back(updated(plain.values(), rows_v[i], plain.length()));
    fetched.first.push_back(first(grown_k[i], plain.length() + 1));
    fetched.second.push_back(first(grown_v[i], plain.length() + 1));
  }
  for (int i = 0; i < n; i++) (*all)[i].grow(grown_k[i], grown_v[i]);
  return fetched;
}

void bind_caches(nb::module_& m) {
  m.def("append", &append, nb::arg("caches"), nb::arg("kind"), nb::arg("k"), nb::arg("v"),
        "Append a token's keys and values to each cache, all of class `kind` (mlx-lm's KVCache) and with room: each one's keys "
        "and each one's values, all tokens; else None, with nothing changed.");
}

}  // namespace xd
