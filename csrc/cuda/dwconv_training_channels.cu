#include "dwconv_training_channels.cuh"
#include "dwconv_training_launch.h"

void mnet::cuda::launch_training_channels(const Launcher& launcher, ChannelStep step,
                                          const DwconvTrainingCall& call) {
  launch_channels(launcher, step, call);
}
