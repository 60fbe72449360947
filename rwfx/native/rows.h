// What the kernels on rows share.
//
// Axes, in the order of a name's letters: B the leading dimensions flattened, I input features, O rows of the weight,
// K rows of the set, C columns asked for.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace rwfx {

// The numbers a thread should at least have to move: below that, starting it costs more than it saves.
constexpr int64_t GRAIN = 1 << 15;

inline int64_t grain(int64_t numbers_each) {
  return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, numbers_each));
}

// An operator by its name, where a compiler that traces the call is to see it.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace rwfx

// One case more than AT_DISPATCH_FLOATING_TYPES_AND2, under a name that fits a line.
#define RWFX_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, TYPE, NAME, __VA_ARGS__)
