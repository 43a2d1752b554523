// Compiled with this instruction set switched on (setup.py); without it there is no such level.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "level.h"

static const Kernels kernels = table("avx512", avx512::quantize);
const Kernels* const nanovllm::avx512_kernels = &kernels;
#else
#include "kernels.h"

const nanovllm::Kernels* const nanovllm::avx512_kernels = nullptr;
#endif
