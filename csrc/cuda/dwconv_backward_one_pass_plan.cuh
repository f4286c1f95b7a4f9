// How dwconv_backward_one_pass.cuh shares out its work, and where things lie in shared memory.
#pragma once

#include <algorithm>

#include "dwconv_backward_call.cuh"

namespace mnet::cuda {

inline constexpr int kOnePassThreads = 256;  // at most
inline constexpr int kOnePassLanes = 8, kOnePassWidth = 2;
inline constexpr int kOnePassChannels = kOnePassLanes * kOnePassWidth;

// Steps that copies run ahead: some 40 KiB on their way on a multiprocessor.
template <typename Element>
constexpr int kOnePassAhead = sizeof(Element) == 4 ? 2 : 3;

// Pixels from a strip to the next: in a row of x or dy; in one of dconv.
inline constexpr int kOnePassStrip = 5;
constexpr int one_pass_strip_of_dconv(int S) { return 4 / S + 1; }

// Rows of the ring: those that a row of dx sees and the one that is filled.
constexpr int one_pass_ring(int S) { return 2 / S + 2; }

struct OnePassPlan {
  int groups;      // of channels
  int strips;      // of a tile, with the `beside` at each end whose dx is the next tile's
  int beside;      // 0 where a tile is a whole row
  int origin;      // column of dconv where the first tile begins, without them
  int tiles;       // in a row
  int rows;        // steps of a row block
  int row_blocks;  // in an image
  int images;      // side by side in a block
  int turns;       // of a block, each of so many images
  int chunks;      // of images

  // Shared memory: stages of what a step reads, of each image S rows of x and one of dy; the ring;
  // five values a channel. In bytes: a row, a stage, all stages; in floats: an image in a row of
  // the ring, a row of it.
  int row, stage, stages;
  int image_dconv, row_dconv;
  int shared_bytes;
  int step_x, step_dy;  // elements of x and dy that a step goes down

  int64_t blocks() const { return int64_t{groups} * tiles * row_blocks * chunks; }
  int threads() const {
    return static_cast<int>(divide_up(int64_t{images} * strips * kOnePassLanes, 32)) * 32;
  }
};

// What an H100 runs at once: two blocks a multiprocessor, which share its memory.
inline constexpr int64_t kOnePassWave = 264;
inline constexpr int kOnePassShared = 112 << 10;

// Blocks are some two waves, where the call has as many rows.
inline OnePassPlan one_pass_plan(const DwconvBackwardCall& call) {
  const DwconvCall& f = call.forward;
  const int64_t S = f.SH, T = 4 / S;
  constexpr int64_t kMost = kOnePassThreads / kOnePassLanes;  // strips
  // A row block computes two rows of dconv again and waits for its first.
  constexpr int64_t kFewRows = 28;

  // Of dconv from `origin` on, so that all of it and of dx is there.
  const int64_t origin = f.left == 0 ? -1 : 0;
  const int64_t columns = std::max(f.OW - 1, (f.W + f.left - 2) / S) - origin + 1;
  int64_t strips = divide_up(columns, T), tiles = 1;
  const int64_t beside = strips > kMost ? 1 : 0;
  if (beside > 0) {
    tiles = divide_up(strips, kMost - 2 * beside);
    strips = divide_up(strips, tiles) + 2 * beside;
  }

  OnePassPlan plan;
  const int bytes = static_cast<int>(element_bytes(f)), strip_count = static_cast<int>(strips);
  // x's pixels past the last strip; room that keeps images from meeting in a bank.
  plan.row = (strip_count * kOnePassStrip + 4) * kOnePassChannels * bytes;
  // The pixel before an image's first strip is that past the last image's last: both are zeros.
  plan.image_dconv =
      (strip_count * one_pass_strip_of_dconv(static_cast<int>(S)) + 2) * kOnePassChannels;
  const int ring = one_pass_ring(static_cast<int>(S));
  const int stages = 1 + (bytes == 4 ? kOnePassAhead<float> : kOnePassAhead<bfloat16>);
  const int image_stage = static_cast<int>(S + 1) * plan.row;
  const int image_bytes = stages * image_stage + ring * plan.image_dconv * 4;

  const int64_t groups = divide_up(f.C, kOnePassChannels);
  int64_t images =
      beside > 0 ? 1 : std::clamp<int64_t>(kOnePassShared / image_bytes, 1, kMost / strips);
  auto blocks = [&](int64_t row_blocks) {
    return groups * tiles * row_blocks * divide_up(f.N, images);
  };
  while (images > 1 && blocks(1) < kOnePassWave) images = divide_up(images, 2);
  const int64_t all = std::max((f.H - 1 + f.top) / S + 1, f.OH);
  int64_t rows = all;
  while (rows >= 2 * kFewRows && blocks(divide_up(all, rows)) < kOnePassWave)
    rows = divide_up(rows, 2);
  const int64_t row_blocks = divide_up(all, rows), turns = divide_up(f.N, images);
  const int64_t chunks = std::min(turns, divide_up(2 * kOnePassWave, groups * tiles * row_blocks));

  plan.groups = static_cast<int>(groups), plan.strips = strip_count;
  plan.beside = static_cast<int>(beside), plan.origin = static_cast<int>(origin);
  plan.tiles = static_cast<int>(tiles), plan.rows = static_cast<int>(rows);
  plan.row_blocks = static_cast<int>(row_blocks), plan.images = static_cast<int>(images);
  plan.turns = static_cast<int>(divide_up(turns, chunks));
  plan.chunks = static_cast<int>(divide_up(turns, plan.turns));
  plan.stage = plan.images * image_stage, plan.stages = stages * plan.stage;
  plan.row_dconv = plan.images * plan.image_dconv + 2 * kOnePassChannels;
  plan.shared_bytes = plan.stages + (ring * plan.row_dconv + 5 * kOnePassChannels) * 4;
  plan.step_x = static_cast<int>(S * f.W * f.C), plan.step_dy = static_cast<int>(f.OW * f.C);
  return plan;
}

}  // namespace mnet::cuda
