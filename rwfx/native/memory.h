// Memory of kernels: of what they give, and of what they need while they run.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rwfx {

constexpr int64_t LARGE_PAGE = int64_t(1) << 21;

// Asks for large pages, where the system gives them to who asks: of small ones there are more in what is read in no
// order than a processor remembers the places of, and each that is new costs more than to pass over it.
inline void ask_for_large_pages([[maybe_unused]] void* at, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto first = (reinterpret_cast<uintptr_t>(at) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const auto last = (reinterpret_cast<uintptr_t>(at) + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

// A tensor; of a large one the pages that are new are large pages.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
  ask_for_large_pages(tensor.mutable_data_ptr(), static_cast<int64_t>(tensor.nbytes()));
  return tensor;
}

// Memory in large pages.
class LargePages {
 public:
  LargePages() = default;
  explicit LargePages(int64_t bytes)
      : bytes_((bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE), at_(std::aligned_alloc(LARGE_PAGE, bytes_)) {
    if (!at_) {
      throw std::bad_alloc();
    }
    ask_for_large_pages(at_.get(), bytes_);
  }
  int64_t bytes() const {
    return bytes_;
  }
  void* data() {
    return at_.get();
  }

 private:
  struct Free {
    void operator()(void* at) const {
      std::free(at);
    }
  };
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> at_;
};

// What a thread keeps from one kernel to the next.
struct Kept {
  LargePages memory;
  bool in_use = false;

  static Kept& of_thread() {
    static thread_local Kept kept;
    return kept;
  }
};

// Room for `size` numbers, in memory that the thread keeps: new pages cost more than a sparse product. A thread has one
// at a time.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    Kept& kept = Kept::of_thread();
    TORCH_INTERNAL_ASSERT(!kept.in_use, "a thread has one scratch memory at a time.");
    if (bytes > MOST_KEPT) {
      own_ = LargePages(bytes);
    } else if (bytes > kept.memory.bytes()) {
      kept.memory = LargePages(bytes);
    }
    data_ = static_cast<T*>(own_.bytes() ? own_.data() : kept.memory.data());
    kept.in_use = true;
  }
  ~Scratch() {
    Kept::of_thread().in_use = false;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() {
    return data_;
  }

 private:
  static constexpr int64_t MOST_KEPT = int64_t(1) << 25;  // bytes
  LargePages own_;
  T* data_;
};

}  // namespace rwfx
