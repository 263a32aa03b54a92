// Compiled where CUDA's headers are: holds plugins/tensorrt/driver.h to cuda.h.
#include <cuda.h>

#include "driver.h"

using namespace moevlm::tensorrt;

#define MEMBER(mine, official, m, o) static_assert(offsetof(mine, m) == offsetof(official, o), #m)

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(alignof(LaunchAttribute) == alignof(CUlaunchAttribute));
MEMBER(LaunchAttribute, CUlaunchAttribute, id, id);
MEMBER(LaunchAttribute, CUlaunchAttribute, is_set, value.programmaticStreamSerializationAllowed);
static_assert(kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);

static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
MEMBER(LaunchConfig, CUlaunchConfig, grid, gridDimX);
MEMBER(LaunchConfig, CUlaunchConfig, block, blockDimX);
MEMBER(LaunchConfig, CUlaunchConfig, shared, sharedMemBytes);
MEMBER(LaunchConfig, CUlaunchConfig, stream, hStream);
MEMBER(LaunchConfig, CUlaunchConfig, attributes, attrs);
MEMBER(LaunchConfig, CUlaunchConfig, attribute_count, numAttrs);
