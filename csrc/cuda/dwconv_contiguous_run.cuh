// Depthwise convolution, contiguous, of any width, padding and alignment. Some whole planes, or
// some rows of one, are one run of memory. A block loads its run flat, 16 bytes at a time whatever
// the width, into shared memory, computes from there, and stores its outputs, again one run,
// likewise. For planes smaller than a block, and for rows that are no whole vectors.
#pragma once

#include "dwconv_contiguous.cuh"

namespace mnet::cuda {

template <int K>
constexpr int kRunStrip = K == 7 ? 4 : 7;

// Planes whose length is a multiple of 16 bytes lie some bytes further apart in shared memory:
// threads that walk down neighbouring planes would meet in the same few of its banks.
struct Skew {
  Divisor vectors;  // of a plane
  int elements;     // 0: planes lie as in global memory

  // What is added to the place of the run's vector `index`.
  __device__ __forceinline__ int before(int index) const {
    if (elements == 0) return 0;
    uint32_t plane = index;
    vectors.divide(plane);
    return static_cast<int>(plane) * elements;
  }
};

struct ContiguousRunPlan {
  Divisor tiles;           // row tiles of a plane; 1 where a block has whole planes
  Divisor planes, strips;  // of a block
  Divisor channels;
  int rows;       // output rows of a tile
  int slab_rows;  // output rows that a thread walks
  int items;      // strips x planes x slabs
  int out_at;     // bytes in front of the outputs in shared memory
  int shared_bytes;
  Skew in, out;
  int64_t all_planes;
};

// How a run of elements lies between 16-byte boundaries: a head, whole vectors, a tail.
template <typename Element>
struct Run {
  static constexpr int V = 16 / sizeof(Element);
  int head, vectors, tail;

  __device__ __forceinline__ Run(const Element* at, int count) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16 / sizeof(Element));
    head = (V - past) % V;
    head = head < count ? head : count;
    vectors = (count - head) / V;
    tail = count - head - vectors * V;
  }

  // The element of head or tail that this thread moves; negative for none.
  __device__ __forceinline__ int edge() const {
    const int t = static_cast<int>(threadIdx.x);
    return t < head ? t : t < head + tail ? t + vectors * V : -1;
  }
};

// Where in 16 bytes of shared memory a copy of `at` lies, so that both are aligned alike.
template <typename Element>
__device__ __forceinline__ Element* alike(unsigned char* shared, const Element* at) {
  return reinterpret_cast<Element*>(shared + reinterpret_cast<uintptr_t>(at) % 16);
}

// A block copies `count` elements, from global to shared memory.
template <typename Element>
__device__ __forceinline__ void copy_in(const Element* from, int count, Element* to,
                                        const Skew& skew) {
  constexpr int V = Run<Element>::V, kAtOnce = 8;
  const Run<Element> run(from, count);
  for (int i = threadIdx.x; i < run.vectors; i += kAtOnce * kContiguousThreads) {
    Vector<Element, V> vector[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = i + u * kContiguousThreads;
      vector[u] = load<V>(from + run.head + at * V, at < run.vectors);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int at = i + u * kContiguousThreads;
      Element* const place = to + run.head + at * V + skew.before(at);
      if (skew.elements == 0) {
        store_shared(place, vector[u], at < run.vectors);
      } else {
        Vector<Element, V / 2> half[2];
        memcpy(half, &vector[u], sizeof half);
        store_shared(place, half[0], at < run.vectors);
        store_shared(place + V / 2, half[1], at < run.vectors);
      }
    }
  }
  const int edge = run.edge();
  const auto element = load<1>(from + edge, edge >= 0);
  store_shared(to + edge + skew.before(edge / V), element, edge >= 0);
}

// And back.
template <typename Element>
__device__ __forceinline__ void copy_out(const Element* from, int count, Element* to,
                                         const Skew& skew) {
  constexpr int V = Run<Element>::V;
  const Run<Element> run(to, count);
  for (int i = threadIdx.x; i < run.vectors; i += kContiguousThreads) {
    const Element* const place = from + run.head + i * V + skew.before(i);
    Vector<Element, V> vector;
    if (skew.elements == 0) {
      vector = load_shared<V>(place);
    } else {
      Vector<Element, V / 2> half[2];
      half[0] = load_shared<V / 2>(place);
      half[1] = load_shared<V / 2>(place + V / 2);
      memcpy(&vector, half, sizeof vector);
    }
    store(to + run.head + i * V, vector);
  }
  const int edge = run.edge();
  const auto element = load_shared<1>(from + edge + skew.before(edge / V), edge >= 0);
  store(to + edge, element, edge >= 0);
}

// Whole: strips are whole and the padding is at most the usual one, so that all columns lie inside
// but those of the halo.
template <typename Element, int K, int S, bool Whole, Activations Known>
__global__ void __launch_bounds__(kContiguousThreads)
    dwconv_contiguous_run(const DwconvCall call, const ContiguousRunPlan plan) {
  constexpr int T = kRunStrip<K>, kColumns = (T - 1) * S + K;
  const int H = call.H, W = call.W, OH = call.OH, OW = call.OW;
  uint32_t group = blockIdx.x;
  const int tile_oh = static_cast<int>(plan.tiles.divide(group)) * plan.rows;
  const int64_t plane0 = static_cast<int64_t>(group) * plan.planes.value;
  const int64_t left_planes = plan.all_planes - plane0;
  const int planes = left_planes < plan.planes.value ? left_planes : plan.planes.value;
  const int rows = OH - tile_oh < plan.rows ? OH - tile_oh : plan.rows;

  // Input rows [begin, end) of each plane; both runs begin with the first plane's first.
  const int tile_ih = tile_oh * S - static_cast<int>(call.top);
  const int last_ih = tile_ih + (rows - 1) * S + K;
  const int begin = tile_ih > 0 ? tile_ih : 0, end = last_ih < H ? last_ih : H;
  const int in_count = end > begin ? ((planes - 1) * H + end - begin) * W : 0;
  const auto* x = static_cast<const Element*>(call.x) + plane0 * (H * W) + begin * W;
  auto* y = static_cast<Element*>(call.y) + plane0 * (OH * OW) + tile_oh * OW;
  Element* const in_shared = alike(shared_memory(), x);
  Element* const out_shared = alike(shared_memory() + plan.out_at, y);

  int ow = 0, plane = 0, row0 = 0;
  float taps[K * K], scale = 1, shift = 0;
  auto prepare = [&](int item) {
    uint32_t rest = item;
    ow = static_cast<int>(plan.strips.divide(rest)) * T;
    plane = static_cast<int>(plan.planes.divide(rest));
    row0 = static_cast<int>(rest) * plan.slab_rows;
    const bool valid = item < plan.items && plane < planes && row0 < rows;
    uint32_t c = static_cast<uint32_t>(plane0) + (valid ? plane : 0);
    c = plan.channels.divide(c);
    load_taps_of<K, Element>(call, c, valid, taps);
    scale = per_channel(call.scale, c, 1), shift = per_channel(call.shift, c, 0);
    return valid;
  };
  bool valid = prepare(threadIdx.x);  // on its way together with the run
  copy_in(x, in_count, in_shared, plan.in);
  __syncthreads();

  for (int item = threadIdx.x; item < plan.items; valid = prepare(item += kContiguousThreads)) {
    if (!valid) continue;
    const int iw = ow * S - static_cast<int>(call.left), ih = tile_ih + row0 * S;
    uint32_t inside = 0;  // a bit for each column
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      inside |= static_cast<uint32_t>(static_cast<unsigned>(iw + j) < static_cast<unsigned>(W))
                << j;
    auto surely = [](int j) { return Whole && j >= K / 2 && j < kColumns - K / 2; };
    const Element* const from =
        in_shared + plane * (H * W + plan.in.elements) + ((ih - begin) * W + iw);
    Element* to = out_shared + plane * (OH * OW + plan.out.elements) + (row0 * OW + ow);
    const int walked = rows - row0 < plan.slab_rows ? rows - row0 : plan.slab_rows;
    walk<K, S, T>(
        (walked - 1) * S + K, taps,
        [&](int i, int, auto& in) {
          if (static_cast<unsigned>(ih + i) >= static_cast<unsigned>(H)) return false;
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            in[j] = widen(load_shared<1>(from + i * W + j, surely(j) || (inside >> j & 1)).lane[0]);
          return true;
        },
        [&](float (&z)[T]) {
          finish_strip<Known>(call, scale, shift, z);
#pragma unroll
          for (int t = 0; t < T; ++t) {
            Vector<Element, 1> element{narrow<Element>(z[t])};
            store_shared(to + t, element, Whole || ow + t < OW);
          }
          to += OW;
        });
  }
  __syncthreads();
  copy_out(out_shared, ((planes - 1) * OH + rows) * OW, y, plan.out);
}

// The bytes between two planes, 0 where their length is no multiple of 16: a plane begins in the
// bank where one row more of the plane before it would, so that the banks of a warp's strips, some
// rows and planes, follow one another as if it were one row.
inline int64_t skew_bytes(int64_t height, int64_t width, int64_t element) {
  if (height * width * element % 16 != 0) return 0;
  const int64_t apart = (128 - (height - 1) * width % 128 * element % 128) % 128;
  return apart % 8 == 0 && apart > 0 ? apart : 8;
}

// What a run of so many planes, or so many rows of one, takes of shared memory: the elements, 16
// bytes of room to align them, and the skew.
inline int64_t run_bytes(int64_t planes, int64_t height, int64_t rows, int64_t width,
                         int64_t element) {
  const int64_t elements = ((planes - 1) * height + rows) * width;
  const int64_t skew = (planes - 1) * skew_bytes(height, width, element);
  return divide_up(elements * element + skew, 16) * 16 + 16;
}

inline int64_t run_in_bytes(const DwconvCall& call, int64_t planes, int64_t rows) {
  const int64_t in_rows = std::min(call.H, (rows - 1) * call.SH + call.KH);
  return run_bytes(planes, call.H, in_rows, call.W, element_bytes(call));
}

inline int64_t run_out_bytes(const DwconvCall& call, int64_t planes, int64_t rows) {
  return run_bytes(planes, call.OH, rows, call.OW, element_bytes(call));
}

inline int64_t run_shared_bytes(const DwconvCall& call, int64_t planes, int64_t rows) {
  return run_in_bytes(call, planes, rows) + run_out_bytes(call, planes, rows);
}

inline constexpr int64_t kRunBytes = 27 << 10;  // of shared memory: 8 blocks fit

inline Skew skew_of(const void* base, int64_t height, int64_t width, int64_t planes,
                    int64_t bytes) {
  const int64_t apart = skew_bytes(height, width, bytes);
  Skew skew{};
  if (planes == 1 || apart == 0 || !aligned(base, 16)) return skew;
  skew.vectors = Divisor(static_cast<uint32_t>(height * width * bytes / 16));
  skew.elements = static_cast<int>(apart / bytes);
  return skew;
}

// The most planes, or rows of one, that kRunBytes hold, but fewer where that leaves
// multiprocessors without a block.
template <int K>
ContiguousRunPlan run_plan(const DwconvCall& call) {
  const int64_t all_planes = call.N * call.C, strips = divide_up(call.OW, kRunStrip<K>);
  const int64_t blocks = 2 * kMultiprocessors;
  int64_t rows = call.OH;
  while (rows > 1 && (run_shared_bytes(call, 1, rows) > kRunBytes ||
                      (rows > 14 && all_planes * divide_up(call.OH, rows) < blocks)))
    rows -= divide_up(rows, 8);
  rows = divide_up(call.OH, divide_up(call.OH, rows));
  // Powers of two: a warp's threads are at the same row of as many planes.
  int64_t planes = 1;
  while (rows == call.OH && 2 * planes * strips <= kContiguousThreads &&
         all_planes > planes * blocks && run_shared_bytes(call, 2 * planes, rows) <= kRunBytes)
    planes *= 2;
  const int64_t slabs = std::max<int64_t>(1, kContiguousThreads / (planes * strips));
  int64_t slab_rows = divide_up(rows, slabs);
  if (planes * strips < 32) slab_rows |= 1;  // a warp's slabs are an odd number of rows apart
  ContiguousRunPlan plan;
  plan.tiles = Divisor(static_cast<uint32_t>(divide_up(call.OH, rows)));
  plan.planes = Divisor(static_cast<uint32_t>(planes));
  plan.strips = Divisor(static_cast<uint32_t>(strips));
  plan.channels = Divisor(static_cast<uint32_t>(call.C));
  plan.rows = static_cast<int>(rows);
  plan.slab_rows = static_cast<int>(slab_rows);
  plan.items = static_cast<int>(strips * planes * divide_up(rows, slab_rows));
  plan.out_at = static_cast<int>(run_in_bytes(call, planes, rows));
  plan.shared_bytes = static_cast<int>(run_shared_bytes(call, planes, rows));
  plan.in = skew_of(call.x, call.H, call.W, planes, element_bytes(call));
  plan.out = skew_of(call.y, call.OH, call.OW, planes, element_bytes(call));
  plan.all_planes = all_planes;
  return plan;
}

struct DwconvContiguousRun {
  static constexpr const char* kName = "contiguous_run";

  static bool can_run(const DwconvCall& call) {
    // An output row of a plane must fit into what every GPU grants a block unasked.
    return contiguous_fast_path(call) && run_shared_bytes(call, 1, 1) <= 48 << 10;
  }

  template <typename Element, typename Launcher>
  static void launch(Launcher&& launcher, const DwconvCall& call) {
    with_contiguous_kernel(call, [&](auto kernel, auto stride) {
      constexpr int K = decltype(kernel)::value, S = decltype(stride)::value;
      const int64_t past_right = (call.OW - 1) * S + K - call.left - call.W;
      const bool whole = call.OW % kRunStrip<K> == 0 && call.left <= K / 2 && past_right <= K / 2;
      if (whole)
        start<Element, K, S, true>(launcher, call);
      else
        start<Element, K, S, false>(launcher, call);
    });
  }

 private:
  template <typename Element, int K, int S, bool Whole, typename Launcher>
  static void start(Launcher&& launcher, const DwconvCall& call) {
    const auto plan = run_plan<K>(call);
    const int64_t groups = divide_up(plan.all_planes, plan.planes.value);
    const Geometry geometry{groups * plan.tiles.value, kContiguousThreads, plan.shared_bytes, true};
    with_activations<Whole>(call, [&](auto known) {
      launcher(dwconv_contiguous_run<Element, K, S, Whole, known>, geometry, call, plan);
    });
  }
};

}  // namespace mnet::cuda
