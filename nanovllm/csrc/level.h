// One level: every kernel, compiled for the instruction set that the including file is compiled for.
#pragma once

#include "attention.h"
#include "group.h"
#include "linear.h"
#include "mamba.h"
#include "moe.h"
#include "rows.h"
#include "sampling.h"
#include "store_kv.h"

namespace {

constexpr Kernels table(const char* name, Kernel<QuantizeCall> quantize) {
    return {name,
            linear,
            route,
            mixture,
            rms_norm,
            layer_norm,
            {attention<PlainKV<F32Weight>>, attention<PlainKV<Bf16Weight>>, attention<Int8KV>},
            {store_kv<PlainKV<F32Weight>>, store_kv<PlainKV<Bf16Weight>>, store_kv<Int8KV>},
            rope,
            gather,
            elementwise,
            log_softmax,
            draw,
            penalise,
            mamba2,
            rms_scale,
            all_reduce,
            gather_ranks,
            quantize,
            EIGHT_BIT};
}

}  // namespace
