// From a training call's tasks to the kernels above. Included once per instruction set.

// run(rows, block) or run(plane, block, channel) for tasks [begin, end): blocks of a chunk of
// channels, then those of the next.
template <typename Rows, typename Run>
static void training_rows(const DwconvTrainingCall& call, int64_t begin, int64_t end, void* scratch,
                          int64_t blocks, const Run& run) {
  while (begin < end) {
    const int64_t chunk = begin / blocks, c = chunk * call.channel_chunk;
    const int64_t c_end = chunk + 1 < call.channel_chunks ? c + call.channel_chunk : call.K;
    Rows rows(call, c, c_end, scratch);
    for (; begin < end && begin / blocks == chunk; ++begin) run(rows, begin % blocks);
  }
}

template <typename Elem, typename Run>
static void training_planes(const DwconvTrainingCall& call, int64_t begin, int64_t end,
                            void* scratch, int64_t blocks, const Run& run) {
  TrainingPlane<Elem> plane(call, scratch);
  for (; begin < end; ++begin) run(plane, begin % blocks, begin / blocks);
}

template <typename Run>
MNET_INLINE void training_of(const DwconvTrainingCall& call, int64_t begin, int64_t end,
                             void* scratch, const Run& run) {
  const int64_t blocks = (call.N + call.images - 1) / call.images * call.bands;
  if (dwconv_training_is_fast(call, kWidth<float>)) {
    auto fast = [&](auto kernel, auto stride) __attribute__((always_inline)) {
      using Rows = TrainingRows<decltype(kernel)::value, decltype(stride)::value>;
      training_rows<Rows>(call, begin, end, scratch, blocks, run);
    };
    if (!dwconv_training_is_square(call)) return fast(Constant<0>{}, Constant<0>{});
    if (call.KH == 3 && call.SH == 1) return fast(Constant<3>{}, Constant<1>{});
    if (call.KH == 3 && call.SH == 2) return fast(Constant<3>{}, Constant<2>{});
    if (call.KH == 5 && call.SH == 1) return fast(Constant<5>{}, Constant<1>{});
    if (call.KH == 5 && call.SH == 2) return fast(Constant<5>{}, Constant<2>{});
  }
  auto general = [&](auto element) __attribute__((always_inline)) {
    training_planes<decltype(element)>(call, begin, end, scratch, blocks, run);
  };
  switch (call.element) {
    case Element::f32: return general(float{});
    case Element::f64: return general(double{});
    case Element::bf16: return general(bf16{});
    case Element::f16: return general(f16{});
  }
}

static void dwconv_statistics(const DwconvTrainingCall& call, int64_t begin, int64_t end,
                              void* scratch) {
  training_of(call, begin, end, scratch, [](auto& on, auto... task) { on.statistics(task...); });
}

static void dwconv_gradient_sums(const DwconvTrainingCall& call, int64_t begin, int64_t end,
                                 void* scratch) {
  training_of(call, begin, end, scratch, [](auto& on, auto... task) { on.gradient_sums(task...); });
}

static void dwconv_gradients(const DwconvTrainingCall& call, int64_t begin, int64_t end,
                             void* scratch) {
  training_of(call, begin, end, scratch, [](auto& on, auto... task) { on.gradients(task...); });
}

// Planes [begin, end) of y = activate(scale * (z - mean) + shift), contiguous float32.
static void dwconv_normalise(const DwconvTrainingCall& call, int64_t begin, int64_t end, void*) {
  using Vec = Vector<float>;
  constexpr int V = kWidth<float>, kBlock = 4;
  const Clamp<float> clamp = clamp_of<float>(call.activation);
  const int64_t pixels = call.OH * call.OW;
  for (int64_t plane = begin; plane < end; ++plane) {
    auto value = [&](const void* of) { return static_cast<const float*>(of)[plane % call.K]; };
    const float mean = value(call.mean), scale = value(call.scale), shift = value(call.shift);
    const float* z = static_cast<const float*>(call.z) + plane * pixels;
    float* y = static_cast<float*>(call.y) + plane * pixels;
    for (int64_t i = 0; i < pixels; i += kBlock * V) {
      auto lanes = [&](int b) {
        const int64_t left = pixels - i - b * V;
        return static_cast<int>(left < 0 ? 0 : left < V ? left : V);
      };
      Vec out[kBlock];
      for (int b = 0; b < kBlock; ++b)
        out[b] =
            lanes(b) == 0 ? Vec{} : (load_lanes(z + i + b * V, lanes(b)) - mean) * scale + shift;
      if (!clamp.exact) activate_registers<float, kBlock>(call, out);
      for (int b = 0; b < kBlock; ++b)
        if (lanes(b) > 0)
          store_lanes(y + i + b * V, at_most<float>(at_least<float>(out[b], clamp.low), clamp.high),
                      lanes(b));
    }
  }
}

static int64_t dwconv_training_scratch(const DwconvTrainingCall& call) {
  if (dwconv_training_is_fast(call, kWidth<float>)) {
    const int64_t last = call.K - (call.channel_chunks - 1) * call.channel_chunk;
    const int64_t floats = TrainingScratch(call, last).floats;
    return floats * static_cast<int64_t>(sizeof(float));
  }
  auto bytes = [&](int64_t accumulator, int64_t element) {
    auto whole = call;
    whole.rows_per_task = call.OH;
    return PlaneScratch(whole, accumulator, element).bytes;
  };
  switch (call.element) {
    case Element::f64: return bytes(8, 8);
    case Element::f32: return bytes(4, 4);
    default: return bytes(4, 2);
  }
}
