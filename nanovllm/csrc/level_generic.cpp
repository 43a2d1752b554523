// Any processor: vectors of four, which are SSE2 on x86-64 and NEON on ARM.
#include "level.h"

static const Kernels kernels = table("generic", generic::quantize);
const Kernels* const nanovllm::generic_kernels = &kernels;
