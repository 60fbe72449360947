// Vectors of the processor's width, and their transposition.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace rwfx {

#ifdef __AVX512F__
constexpr int64_t VECTOR_BYTES = 64;
#else
constexpr int64_t VECTOR_BYTES = 32;
#endif

template <class T>
constexpr int64_t LANES = VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

// Read from where numbers are aligned, and vectors need not be.
template <class T>
using Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias)) = T;

template <class T>
Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T, class V>
void store(T* to, V vector) {
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// By halves, which compilers make two shuffles a level.
template <class T, class V>
T sum_of(V vector) {
  T lane[LANES<T>];
  store(lane, vector);
  for (int64_t half = LANES<T> / 2; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lane[i] += lane[i + half];
    }
  }
  return lane[0];
}

// a[0], b[0], a[1], b[1], ...: of the first halves, or of the second ones.
template <class T, bool SECOND, std::size_t... K>
Vector<T> interleave(Vector<T> a, Vector<T> b, std::index_sequence<K...>) {
  constexpr std::size_t first = SECOND ? sizeof...(K) / 2 : 0;
  return __builtin_shufflevector(a, b, (K % 2 ? sizeof...(K) + first + K / 2 : first + K / 2)...);
}

// LANES vectors of LANES numbers, in place: a perfect shuffle of the rows, as often as it takes to transpose.
template <class T>
void transpose(Vector<T>* rows) {
  constexpr int64_t L = LANES<T>;
  constexpr auto all = std::make_index_sequence<L>();
  for (int64_t done = 1; done < L; done *= 2) {
    Vector<T> next[L];
    for (int64_t i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<T, false>(rows[i], rows[i + L / 2], all);
      next[2 * i + 1] = interleave<T, true>(rows[i], rows[i + L / 2], all);
    }
    for (int64_t i = 0; i < L; ++i) {
      rows[i] = next[i];
    }
  }
}

}  // namespace rwfx
