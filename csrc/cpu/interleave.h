// A few planes of values to pixels of as many channels: an image in PyTorch's default layout, as
// channels_last. Included once per instruction set (see instruction_set.inc).

// What the values are is of no matter, only how large they are.
template <typename Bits>
static void interleave_planes(const InterleaveCall& call) {
  constexpr int V = kWidth<float>;
  typedef Bits Row __attribute__((vector_size(V * sizeof(Bits))));
  const auto* x = static_cast<const Bits*>(call.x);
  auto* y = static_cast<Bits*>(call.y);
  const int64_t C = call.C, plane = call.plane, pixels = call.OH * call.W;
  int64_t p = 0;
  if (C == 3) {
    // Vector v of three takes its lane l from pixel (v * V + l) / 3 of plane (v * V + l) % 3:
    // first from planes 0 and 1, then what is of plane 2.
    Row two[3], three[3];
    for (int i = 0; i < 3 * V; ++i) {
      const auto lane = static_cast<Bits>(i % V), pixel = static_cast<Bits>(i / 3);
      two[i / V][i % V] = static_cast<Bits>(pixel + (i % 3 == 1 ? V : 0));
      three[i / V][i % V] = static_cast<Bits>(i % 3 == 2 ? V + pixel : lane);
    }
    for (; p + V <= pixels; p += V) {
      const auto a = load_bits<Row>(x + p), b = load_bits<Row>(x + plane + p),
                 c = load_bits<Row>(x + 2 * plane + p);
      for (int v = 0; v < 3; ++v) {
        const Row out = __builtin_shuffle(__builtin_shuffle(a, b, two[v]), c, three[v]);
        __builtin_memcpy(y + 3 * p + v * V, &out, sizeof out);
      }
    }
  }
  for (; p < pixels; ++p)
    for (int64_t c = 0; c < C; ++c) y[p * C + c] = x[c * plane + p];
}

static void interleave(const InterleaveCall& call) {
  if (call.element == Element::bf16) return interleave_planes<u16>(call);
  interleave_planes<u32>(call);
}
