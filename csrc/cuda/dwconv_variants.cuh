// The forward kernels of dwconv_bn_act and the choice between them.
#pragma once

#include "dwconv_channels_last.cuh"
#include "dwconv_contiguous_run.cuh"
#include "dwconv_contiguous_stream.cuh"
#include "dwconv_general.cuh"
#include "variants.cuh"

namespace mnet::cuda {

using DwconvVariants = Variants<DwconvChannelsLastStream, DwconvChannelsLastTile,
                                DwconvContiguousStream, DwconvContiguousRun, DwconvGeneral>;

// The fastest variant for a call.
inline const char* choose(const DwconvCall& call) {
  if (channels_last_can_run(call)) {
    // Threads of the stream if each took 7 rows: too few to fill the machine's first wave?
    const int64_t threads = call.N * divide_up(call.OH, 7) * divide_up(call.OW, 2) * call.C / 8;
    return threads < kOneWave ? DwconvChannelsLastTile::kName : DwconvChannelsLastStream::kName;
  }
  const bool stream = DwconvContiguousStream::can_run(call);
  if (stream && stream_width(call) * element_bytes(call) == 16)
    return DwconvContiguousStream::kName;
  if (DwconvContiguousRun::can_run(call)) return DwconvContiguousRun::kName;
  if (stream) return DwconvContiguousStream::kName;
  return DwconvGeneral::kName;
}

}  // namespace mnet::cuda
