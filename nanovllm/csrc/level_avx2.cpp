// Compiled with this instruction set switched on (setup.py); without it there is no such level.
#if defined(__AVX2__) && defined(__FMA__)
#include "level.h"

static const Kernels kernels = table("avx2", avx2::quantize);
const Kernels* const nanovllm::avx2_kernels = &kernels;
#else
#include "kernels.h"

const nanovllm::Kernels* const nanovllm::avx2_kernels = nullptr;
#endif
