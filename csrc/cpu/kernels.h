// What the CPU backend compiles once per instruction set, behind one table of functions.
// No torch header and no standard-library inline code in the files that implement it: whatever
// they instantiate is compiled with instructions that the running machine may not have.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace mnet::cpu {

// Element types as the kernels see them; bf16 and f16 travel as bit patterns.
enum class Element { f32, f64, bf16, f16 };

// One depthwise call on dense tensors. Accumulation is in float (double for f64): `scale`, `shift`
// and `weight`, laid out [tap][channel], are of that type (but see dwconv_keeps_weight). The scale
// is applied to the sum, not folded into the weights: that would round every tap once more.
struct DwconvCall {
  int64_t N, C, H, W;
  int64_t K, OH, OW;  // K = C * multiplier output channels
  int64_t multiplier;
  int64_t KH, KW, SH, SW, DH, DW;
  int64_t top, left;
  const void* x;
  const void* weight;
  const void* scale;
  const void* shift;
  void* y;
  Element element;
  Activation activation;
  double slope;
  bool prefetch;  // x is not in the caches near by (channels_last)
  bool stream;    // y, or dx, may bypass the caches (channels_last, whole aligned lines)
  // How the work is cut into tasks: plan in launch.cpp, plan_contiguous in dwconv_bn_act.cpp.
  int64_t channel_chunk, channel_chunks;  // channels_last: a task is an output row of one chunk
  int64_t rows_per_task, row_tasks;       // contiguous: a task is a block of rows of one plane
  // Elements from one value of the weight to the next, see dwconv_contiguous_is_direct.
  int64_t weight_channel, weight_row, weight_column;
};

// A depthwise call in training, or its gradients. Its output is activate(z), z = scale * centred +
// shift, centred = convolution - mean, and dz = dy * activate'(z); the gradient of the convolution
// is scale * dz + linear * centred + constant. Per-channel vectors are of the accumulation type.
struct DwconvTrainingCall : DwconvCall {
  const void* mean;
  const void* linear;
  const void* constant;
  const void* dy;  // laid out as y
  void* dx;        // laid out as x; null where it is not wanted
  void* z;         // the convolution, laid out as y: written by statistics; where there is one,
                   // gradients read it instead of computing it again
  // [block][value][K], of the accumulation type: what a block of pixels adds to the sums over all.
  void* partials;
  bool channels_last;
  // A block is `images` whole images, or one of the `bands` of one image: output rows for sums,
  // input rows for gradients. A task is a block and a chunk of channels (input channels where the
  // call is not dwconv_training_is_fast). Blocks do not depend on how many threads there are.
  int64_t images, bands;
};

// Whether there is code of its own for a training call's kernel and stride.
inline bool dwconv_training_is_square(const DwconvTrainingCall& call) {
  return call.KH == call.KW && (call.KH == 3 || call.KH == 5) && call.SH == call.SW &&
         call.SH <= 2 && call.DH == 1 && call.DW == 1;
}

// Whether a training call goes by rows, with vectors over channels (`width` floats); the others
// work plane by plane.
constexpr int64_t kMostTapRows = 32;
inline bool dwconv_training_is_fast(const DwconvTrainingCall& call, int64_t width) {
  return call.element != Element::f64 && call.K >= width && call.multiplier == 1 &&
         (dwconv_training_is_square(call) || (call.channels_last && call.KH <= kMostTapRows));
}

// Output channels in a panel of packed convolution weights, whatever the instruction set.
constexpr int64_t kPanel = 32;

// One dense (one group) channels_last convolution, float32 or bfloat16; `weight` packed, `scale`
// and `shift` float32, filled up to whole panels.
struct ConvCall {
  int64_t N, C, H, W;
  int64_t K, OH, OW;
  int64_t taps;  // KH * KW * C: products an output
  int64_t KH, KW, SH, SW, DH, DW;
  int64_t top, left;
  bool pointwise;  // 1x1, stride 1, no padding: the image is its own patches
  const void* x;
  const void* weight;
  const void* scale;
  const void* shift;
  void* y;
  Element element;
  Activation activation;
  double slope;
  bool prefetch;                         // as above; of a pointwise one
  bool stream;                           // as above; float32
  const void* residual;                  // added after the activation, laid out as y; or null
  int64_t pixel_blocks, channel_blocks;  // a task is one of each
  const void* next;                      // bytes that the stage after this one reads: prefetched
  int64_t next_bytes;                    // meanwhile, instead of the next block's pixels
};

// The mean of every channel over an image's pixels, the sigmoid of every value, or every pixel
// times a factor for each channel; channels_last, float32 or bfloat16.
struct MapCall {
  int64_t N, C, pixels;
  const void* x;
  const void* gate;  // (N, C): the factors, where there are any
  void* y;           // of factors it may be x
  Element element;
  int64_t parts;  // of an image, each a task: of its channels for means, else of its pixels
};

// A 1x1 convolution with its norm and activation in training, float32, channels_last: z, (P, K), is
// the product of x, (P, C), and the weight; y = activate(scale * centred + shift) with centred = z
// - mean. Gradients as in DwconvTrainingCall.
struct ConvTrainingCall {
  int64_t P, C, K;  // P: pixels of the whole batch
  int64_t block;    // pixels of a task and of its partials
  Activation activation;
  double slope;
  const float *x, *dy;
  float *z, *y, *dx, *dweight;  // z is read only in backward; dx: null where it is not wanted
  const float *scale, *shift, *mean, *linear, *constant;
  const float *packed, *ones, *zeros;  // of the product (see pack_conv_panels), and its epilogue
  float* partials;                     // [block][value][K]
  bool stream;                         // y may bypass the caches
  // The weight's gradient goes by chunks of pixels, whose operands are packed in panels of
  // kGradientRows output channels and of a vector of input channels, so many floats apart; it is
  // tiled by columns of two vectors and rows of kGradientRows channels, of which a task takes some.
  // Or all of backward goes by slabs of blocks, each with a gradient of the weight of its own, one
  // behind the other in dweight.
  int64_t chunk_first, chunk_pixels;
  float *d_panels, *x_panels;
  int64_t d_stride, x_stride, d_floats, x_floats;
  int64_t columns, row_tiles, slabs;
};

// Rows of an image that lies in planes, `plane` values apart, to channels_last; float32 or
// bfloat16. The other fields are those of a convolution that changes nothing else.
struct InterleaveCall {
  int64_t N, C, H, W;
  int64_t K, OH, OW;
  int64_t plane;
  const void* x;
  void* y;
  Element element;
  static constexpr int64_t KH = 1, SH = 1, DH = 1, top = 0;
};

struct TrainingKernels;
struct Kernels {
  const char* name;
  int64_t width;  // float lanes of a vector
  // Tasks [begin, end) of the call.
  void (*dwconv_channels_last)(const DwconvCall&, int64_t begin, int64_t end);
  void (*dwconv_contiguous)(const DwconvCall&, int64_t begin, int64_t end, void* scratch);
  // Whether dwconv_channels_last reads this call's weight in x's own type.
  bool (*dwconv_keeps_weight)(const DwconvCall&);
  // Whether dwconv_contiguous reads the weight as it is, in x's own type, and needs no scratch.
  bool (*dwconv_contiguous_is_direct)(const DwconvCall&);
  // Elements of scratch, of the accumulation type, that a thread of dwconv_contiguous needs else.
  int64_t (*dwconv_contiguous_scratch)(const DwconvCall&);
  void (*conv_channels_last)(const ConvCall&, int64_t begin, int64_t end, void* scratch);
  // Bytes of scratch that a thread of conv_channels_last needs.
  int64_t (*conv_channels_last_scratch)(const ConvCall&);
  void (*pool_channels_last)(const MapCall&, int64_t begin, int64_t end);
  void (*sigmoid_channels_last)(const MapCall&, int64_t begin, int64_t end);
  void (*scale_channels_last)(const MapCall&, int64_t begin, int64_t end);
  void (*interleave)(const InterleaveCall&);
  const TrainingKernels* training;
};

struct TrainingKernels {
  int64_t width;  // float lanes of a vector
  // Partials: a pivot, and the sums of (convolution - pivot) and of its square, each in two
  // numbers.
  void (*dwconv_statistics)(const DwconvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  // Partials: the sums of dz * centred and of dz, likewise.
  void (*dwconv_gradient_sums)(const DwconvTrainingCall&, int64_t begin, int64_t end,
                               void* scratch);
  // dx. Partials: the gradient of every tap of the weight.
  void (*dwconv_gradients)(const DwconvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  // Planes [begin, end) of y from z: contiguous; conv_normalise serves channels_last.
  void (*dwconv_normalise)(const DwconvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  // Bytes of scratch that a thread of these needs.
  int64_t (*dwconv_training_scratch)(const DwconvTrainingCall&);
  // Output channels of a panel of the weight's gradient.
  int64_t gradient_rows;
  void (*pack_conv_panels)(const float* weight, int64_t K, int64_t C, bool transposed,
                           int64_t begin, int64_t end, float* to);
  void (*conv_statistics)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  void (*conv_normalise)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  void (*conv_gradient_sums)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  void (*conv_data_gradient)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  void (*conv_weight_gradient)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  void (*conv_slab_gradients)(const ConvTrainingCall&, int64_t begin, int64_t end, void* scratch);
  // Bytes of scratch that a thread of these needs.
  int64_t (*conv_training_scratch)(const ConvTrainingCall&);
};

// Widest first, each with a run-time test of the processor; the last one always runs.
struct InstructionSet {
  const Kernels* kernels;
  bool (*runs_here)();
};
extern const InstructionSet kInstructionSets[];
extern const int kInstructionSetCount;

}  // namespace mnet::cpu
