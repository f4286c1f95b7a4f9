// The only loads and stores of device code: vectors of V elements, 2 to 16 bytes, aligned to their
// size. Every kernel goes through them, so the emulation sees each access: it checks alignment
// and, when asked, counts bytes, sectors and bank conflicts. `line`, the caller's, tells it which
// accesses of a warp's lanes are one instruction.
#pragma once

#include "element.cuh"

namespace mnet::cuda {

template <typename Element, int V, bool Pairs = sizeof(Element) == 2 && (V > 1)>
struct alignas(sizeof(Element) * V) Vector {
  static_assert(sizeof(Element) * V <= 16 && (V & (V - 1)) == 0, "one memory instruction");
  Element lane[V];
};

// 16-bit elements stay in pairs, as registers hold them; widen() and narrow() reach them.
template <typename Element, int V>
struct alignas(sizeof(Element) * V) Vector<Element, V, true> {
  static_assert(V <= 8 && (V & (V - 1)) == 0, "one memory instruction");
  uint32_t pair[V / 2];
};

// What one memory instruction moves.
#ifdef __CUDACC__
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
#endif

// Global memory that no thread writes while the kernel runs: V elements from `from` on, or zeros
// where `valid` is false (`from` may then be anything).
template <int V, typename Element>
__device__ __forceinline__ Vector<Element, V> load(const Element* from, bool valid = true,
                                                   int line = __builtin_LINE()) {
  Vector<Element, V> vector{};
#ifdef __CUDACC__
  using W = typename Word<sizeof(vector)>::type;
  if (valid) {
    const W word = __ldg(reinterpret_cast<const W*>(from));
    memcpy(&vector, &word, sizeof vector);
  }
#else
  if (emulation::access(emulation::Space::global_load, from, sizeof vector, valid, line))
    std::memcpy(&vector, from, sizeof vector);
#endif
  return vector;
}

template <int V, typename Element>
__device__ __forceinline__ void store(Element* to, const Vector<Element, V>& vector,
                                      bool valid = true, int line = __builtin_LINE()) {
#ifdef __CUDACC__
  using W = typename Word<sizeof(vector)>::type;
  W word;
  memcpy(&word, &vector, sizeof vector);
  if constexpr (sizeof(vector) == 16) {
    // As an instruction of its own: next to narrower stores of the same values nvcc 13 splits it.
    if (valid)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                   "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w));
  } else if (valid) {
    *reinterpret_cast<W*>(to) = word;
  }
#else
  if (emulation::access(emulation::Space::global_store, to, sizeof vector, valid, line))
    std::memcpy(to, &vector, sizeof vector);
#endif
}

// Likewise for pointers into shared_memory().
template <int V, typename Element>
__device__ __forceinline__ Vector<Element, V> load_shared(const Element* from, bool valid = true,
                                                          int line = __builtin_LINE()) {
  Vector<Element, V> vector{};
#ifdef __CUDACC__
  using W = typename Word<sizeof(vector)>::type;
  if (valid) {
    const W word = *reinterpret_cast<const W*>(from);
    memcpy(&vector, &word, sizeof vector);
  }
#else
  if (emulation::access(emulation::Space::shared_load, from, sizeof vector, valid, line))
    std::memcpy(&vector, from, sizeof vector);
#endif
  return vector;
}

template <int V, typename Element>
__device__ __forceinline__ void store_shared(Element* to, const Vector<Element, V>& vector,
                                             bool valid = true, int line = __builtin_LINE()) {
#ifdef __CUDACC__
  using W = typename Word<sizeof(vector)>::type;
  W word;
  memcpy(&word, &vector, sizeof vector);
  if (valid) *reinterpret_cast<W*>(to) = word;
#else
  if (emulation::access(emulation::Space::shared_store, to, sizeof vector, valid, line))
    std::memcpy(to, &vector, sizeof vector);
#endif
}

template <typename Element, int V>
__device__ __forceinline__ void widen(const Vector<Element, V>& vector, float (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (sizeof(Element) == 2 && V > 1) {
      const uint32_t two = vector.pair[v / 2];
      values[v] = v % 2 == 0 ? widen_low<Element>(two) : widen_high<Element>(two);
    } else {
      values[v] = widen(vector.lane[v]);
    }
  }
}

template <typename Element, int V>
__device__ __forceinline__ Vector<Element, V> narrow(const float (&values)[V]) {
  Vector<Element, V> vector;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (sizeof(Element) == 2 && V > 1) {
      if (v % 2 == 0) vector.pair[v / 2] = narrow_pair<Element>(values[v], values[v + 1]);
    } else {
      vector.lane[v] = narrow<Element>(values[v]);
    }
  }
  return vector;
}

// Elements as they are, apart and joined.
template <typename Element, int V>
__device__ __forceinline__ Vector<Element, 1> element(const Vector<Element, V>& vector, int v) {
  if constexpr (sizeof(Element) == 2 && V > 1)
    return {{static_cast<uint16_t>(vector.pair[v / 2] >> (v % 2 * 16))}};
  else
    return {{vector.lane[v]}};
}

template <typename Element, std::size_t V>
__device__ __forceinline__ Vector<Element, V> join(const Vector<Element, 1> (&elements)[V]) {
  Vector<Element, V> vector;
#pragma unroll
  for (int v = 0; v < static_cast<int>(V); ++v) {
    if constexpr (sizeof(Element) == 4)
      vector.lane[v] = elements[v].lane[0];
    else if (v % 2 == 0)
      vector.pair[v / 2] =
          elements[v].lane[0].bits | static_cast<uint32_t>(elements[v + 1].lane[0].bits) << 16;
  }
  return vector;
}

}  // namespace mnet::cuda
