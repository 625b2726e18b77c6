// The per-channel step between the halves of a batch norm: scale and beta, running statistics, and the backward.
#include <cmath>

#include "activation.h"
#include "arguments.h"
#include "library.h"

namespace bnr {
namespace {

// A per-channel parameter or running statistic, stored as fp32 (code 0) or bf16 (code 1).
float read(const void* p, int64_t element, int64_t c) {
    return element == 0 ? static_cast<const float*>(p)[c] : to_float(static_cast<const bf16*>(p)[c]);
}

void write(void* p, int64_t element, int64_t c, float v) {
    if (element == 0) static_cast<float*>(p)[c] = v;
    else static_cast<bf16*>(p)[c] = to_bf16(v);
}

}  // namespace
}  // namespace bnr

using namespace bnr;

// mean and var to rstd, scale and beta; the running statistics in place.
BNR_EXPORT void bnr_finalize_forward(const FinalizeArguments* a) {
    for (int64_t c = 0; c < a->channels; c++) {
        const double r = 1.0 / std::sqrt(double(a->var[c]) + a->eps);
        a->rstd[c] = float(r);
        a->scale[c] = float(a->weight ? read(a->weight, a->weight_element, c) * r : r);
        a->beta[c] = a->bias ? read(a->bias, a->bias_element, c) : 0.0f;
        if (a->running_mean) {
            const double old = read(a->running_mean, a->running_mean_element, c);
            write(a->running_mean, a->running_mean_element, c, float(old * (1 - a->momentum) + a->mean[c] * a->momentum));
        }
        if (a->running_var) {
            const double old = read(a->running_var, a->running_var_element, c);
            write(a->running_var, a->running_var_element, c, float(old * (1 - a->momentum) + a->var[c] * a->unbias * a->momentum));
        }
    }
}

// dscale, dbeta, rstd and scale to dmean, dvar and dweight; to the first two is added what other readers have made.
BNR_EXPORT void bnr_finalize_backward(const FinalizeArguments* a) {
    for (int64_t c = 0; c < a->channels; c++) {
        const double r = a->rstd[c], scale = a->scale[c];
        a->dmean[c] = float(-scale * a->dbeta[c] + (a->of_mean ? a->of_mean[c] : 0.0f));
        a->dvar[c] = float(-0.5 * a->dscale[c] * scale * r * r + (a->of_var ? a->of_var[c] : 0.0f));
        a->dweight[c] = float(a->dscale[c] * r);
    }
}
