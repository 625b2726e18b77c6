// The per-channel step between the halves of a batch norm: scale and beta, running statistics, and the backward.
#include <cmath>

#include "activation.h"
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

// `unbias` is count / (count - 1). weight, bias, running_mean and running_var may be null.
BNR_EXPORT void bnr_finalize_forward(const float* mean, const float* var, int64_t channels, double unbias,
                                     const void* weight, int64_t weight_element, const void* bias, int64_t bias_element,
                                     void* running_mean, int64_t mean_element, void* running_var, int64_t var_element,
                                     double momentum, double eps, float* rstd, float* scale, float* beta) {
    for (int64_t c = 0; c < channels; c++) {
        const double r = 1.0 / std::sqrt(double(var[c]) + eps);
        rstd[c] = float(r);
        scale[c] = float(weight ? read(weight, weight_element, c) * r : r);
        beta[c] = bias ? read(bias, bias_element, c) : 0.0f;
        if (running_mean) {
            const double old = read(running_mean, mean_element, c);
            write(running_mean, mean_element, c, float(old * (1 - momentum) + mean[c] * momentum));
        }
        if (running_var) {
            const double old = read(running_var, var_element, c);
            write(running_var, var_element, c, float(old * (1 - momentum) + var[c] * unbias * momentum));
        }
    }
}

BNR_EXPORT void bnr_finalize_backward(const float* dscale, const float* rstd, int64_t channels, const void* weight,
                                      int64_t weight_element, float* dvar, float* dweight) {
    for (int64_t c = 0; c < channels; c++) {
        const double r = rstd[c], gamma = weight ? read(weight, weight_element, c) : 1.0;
        dvar[c] = float(-0.5 * dscale[c] * gamma * r * r * r);
        dweight[c] = float(dscale[c] * r);
    }
}
