// One level: every kernel, compiled for the instruction set that the including file is compiled for.
#pragma once

#include "attention.h"
#include "group.h"
#include "linear.h"
#include "mamba.h"
#include "moe.h"
#include "rows.h"
#include "sampling.h"

namespace {

constexpr Kernels table(const char* name) {
    return {name,
            linear,
            route,
            mixture,
            rms_norm,
            layer_norm,
            attention<Bf16Weight>,
            attention<F32Weight>,
            store_kv<Bf16Weight>,
            store_kv<F32Weight>,
            rope,
            gather,
            elementwise,
            log_softmax,
            draw,
            penalise,
            mamba2,
            rms_scale,
            all_reduce,
            gather_ranks};
}

}  // namespace
