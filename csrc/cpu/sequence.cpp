#include "sequence.h"

#include <algorithm>

namespace mnet::cpu {
namespace {

constexpr const char* kOp = "conv_sequence";
constexpr int64_t kColumns = 16, kAlign = 16;  // kAlign: a cache line in floats

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

Stage stage_of(const int64_t* row, DType dtype, int64_t H, int64_t W, const float* constants,
               int64_t count) {
  auto expect = [&](bool good, const char* what) {
    if (!good) check::fail(kOp, "stages", what, check::show(row, kColumns));
  };
  Stage stage{};
  Problem& p = stage.p;
  expect(row[0] >= 0 && row[0] <= 6, "a kind from 0 to 6");
  constexpr Kind kKinds[] = {Kind::depthwise, Kind::dense, Kind::depthwise, Kind::depthwise,
                             Kind::pool,      Kind::scale, Kind::sigmoid};
  stage.kind = kKinds[row[0]];
  const bool is_dense = stage.kind == Kind::dense;
  if (row[0] == 2 || row[0] == 3) stage.pairing = row[0] == 2 ? Pairing::always : Pairing::never;
  stage.other = row[14];
  p.N = 1, p.C = row[1], p.H = H, p.W = W, p.K = row[2], p.KH = row[3], p.KW = row[4];
  p.SH = row[5], p.SW = row[6], p.DH = row[7], p.DW = row[8];
  p.top = row[9], p.left = row[10], p.bottom = row[11], p.right = row[12];
  p.dtype = dtype;
  if (!is_dense && stage.kind != Kind::depthwise) {
    expect(p.C > 0 && p.K == p.C, "as many channels as before");
    p.OH = p.OW = 1;  // a scale's are those of what it scales
    if (stage.kind == Kind::sigmoid) p.OH = H, p.OW = W;
    return stage;
  }
  for (int i = 1; i < 9; ++i)
    expect(row[i] > 0 && row[i] < int64_t{1} << 31, "positive sizes, strides and dilations");
  if (p.top == -1) {
    check::same_padding(p.H, p.KH, p.SH, p.DH, &p.top, &p.bottom);
    check::same_padding(p.W, p.KW, p.SW, p.DW, &p.left, &p.right);
  }
  for (int64_t edge : {p.top, p.left, p.bottom, p.right})
    expect(edge >= 0 && edge < int64_t{1} << 31, "padding of at least 0");
  expect(is_dense || p.K % p.C == 0, "K a multiple of C");
  expect(row[13] >= 0 && row[13] < static_cast<int64_t>(kActivationCount), "a known activation");
  p.activation = static_cast<Activation>(row[13]);
  p.groups = is_dense ? 1 : p.C;
  p.multiplier = p.K / p.groups;
  const int64_t room_h = p.H + p.top + p.bottom - (p.KH - 1) * p.DH - 1;
  const int64_t room_w = p.W + p.left + p.right - (p.KW - 1) * p.DW - 1;
  if (room_h < 0 || room_w < 0)
    check::fail(kOp, "x",
                check::join("a padded size of at least ", (p.KH - 1) * p.DH + 1, " x ",
                            (p.KW - 1) * p.DW + 1, " (the dilated kernel) at every stage"),
                check::join(p.H + p.top + p.bottom, " x ", p.W + p.left + p.right));
  p.OH = room_h / p.SH + 1, p.OW = room_w / p.SW + 1;

  const int64_t channels = is_dense ? panels_of(p.K) * kPanel : p.K;
  const int64_t weights = is_dense ? packed_bytes(p) / 4 : p.KH * p.KW * p.K;
  const bool twice = !is_dense && dtype == DType::bfloat16;
  const int64_t own = twice ? (weights + 1) / 2 : 0;
  const int64_t size = aligned(weights) + aligned(own) + 2 * aligned(channels) + 1;
  expect(row[15] >= 0 && row[15] <= count - size, "an offset that lies within the constants");
  stage.weight = constants + row[15];
  stage.own_weight = stage.weight + aligned(weights);
  stage.scale = stage.own_weight + aligned(own);
  stage.shift = stage.scale + aligned(channels);
  p.slope = stage.shift[aligned(channels)];
  return stage;
}

bool is_pointwise(const Stage& stage) {
  return stage.kind == Kind::dense && conv_call(stage.p).pointwise;
}

// Checks the other value that stage i reads, and takes a scale's size from it.
void connect(Sequence& s, int64_t i, const Tensor& x) {
  Stage& stage = s.stages[static_cast<std::size_t>(i)];
  const int64_t v = stage.other;
  if (v == -1 && stage.kind != Kind::scale) return;
  const bool known = (stage.kind == Kind::dense || stage.kind == Kind::scale) && v >= 0 && v <= i;
  const Problem* from = known && v > 0 ? &s.stages[static_cast<std::size_t>(v - 1)].p : nullptr;
  const int64_t C = from ? from->K : x.size(1), H = from ? from->OH : x.size(2),
                W = from ? from->OW : x.size(3);
  Problem& p = stage.p;
  bool fits = known && C == p.K;
  if (fits && stage.kind == Kind::scale) {
    fits = p.H == 1 && p.W == 1;
    p.OH = H, p.OW = W;
  }
  if (!fits || H != p.OH || W != p.OW)
    check::fail(kOp, "stages",
                stage.kind == Kind::scale ? "an earlier value to multiply by one factor a channel"
                                          : "an earlier value of the result's shape as residual",
                check::join(v, " at stage ", i));
}

Sequence sequence_of(const int64_t* rows, int64_t count, const Tensor& x, const float* constants,
                     int64_t constant_count) {
  Sequence s;
  std::vector<int64_t> last_use(static_cast<std::size_t>(count) + 1);
  int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const DType dtype = facts_of(x).dtype;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* row = rows + i * kColumns;
    if (row[1] != C)
      check::fail(kOp, i ? "stages" : "x", check::join(row[1], " channels"), check::join(C));
    s.stages.push_back(stage_of(row, dtype, H, W, constants, constant_count));
    connect(s, i, x);
    const Stage& stage = s.stages.back();
    C = stage.p.K, H = stage.p.OH, W = stage.p.OW;
    last_use[i] = i;
    if (stage.other >= 0) last_use[stage.other] = i;
  }
  constexpr int64_t kFewPlanes = 4;
  s.planes = x.size(1) <= kFewPlanes && x.is_contiguous() && !is_channels_last(x) &&
             s.stages[0].kind == Kind::dense && s.stages[0].other < 0 && last_use[0] == 0;
  for (int64_t i = 0; i < count; ++i) s.stages[i].last_use = last_use[i + 1];
  for (int64_t i = 0; i + 1 < count; ++i)
    s.stages[i].feeds_block = s.stages[i].kind == Kind::depthwise &&
                              s.stages[i].last_use == i + 1 && s.stages[i + 1].other != i + 1 &&
                              is_pointwise(s.stages[i + 1]);
  return s;
}

}  // namespace

Sequence checked_sequence(const Tensor& x, const Tensor& stages, const Tensor& constants) {
  const TensorFacts facts = facts_of(x);
  const bool known = facts.dtype == DType::float32 || facts.dtype == DType::bfloat16;
  if (facts.dim != 4 || !known || !x.is_cpu() || x.numel() == 0)
    check::fail(kOp, "x", "a float32 or bfloat16 CPU tensor (N, C, H, W) that is not empty",
                check::join(facts.dtype_name, " of ", check::shape(facts)));
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(stages.get(), &dtype));
  if (static_cast<ScalarType>(dtype) != ScalarType::Long || !stages.is_cpu() || stages.dim() != 2 ||
      stages.size(0) < 1 || stages.size(1) != kColumns || !stages.is_contiguous())
    check::fail(kOp, "stages", "an int64 CPU tensor (n, 16)", check::shape(facts_of(stages)));
  if (facts_of(constants).dtype != DType::float32 || !constants.is_cpu() ||
      !constants.is_contiguous())
    check::fail(kOp, "constants", "a contiguous float32 CPU tensor",
                facts_of(constants).dtype_name);
  return sequence_of(static_cast<const int64_t*>(stages.const_data_ptr()), stages.size(0), x,
                     static_cast<const float*>(constants.const_data_ptr()), constants.numel());
}

}  // namespace mnet::cpu
