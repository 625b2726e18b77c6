// The fields of the structures in arguments.h, told to structures.py: what is declared twice is compared when a library is loaded.
#include <cstddef>
#include <string>

#include "arguments.h"
#include "library.h"

namespace bnr {
namespace {

struct Field {
    const char* name;
    std::size_t offset, size;
};

// "Name size: field offset size, field offset size, ..." and the end of a line.
template <std::size_t N>
std::string described(const char* name, std::size_t size, const Field (&fields)[N]) {
    std::string text = std::string(name) + " " + std::to_string(size) + ":";
    for (const Field& f : fields) text += std::string(" ") + f.name + " " + std::to_string(f.offset) + " " + std::to_string(f.size) + ",";
    return text + "\n";
}

#define F(name) Field{#name, offsetof(S, name), sizeof(S::name)}

std::string problem() {
    using S = Problem;
    return described("Problem", sizeof(S), {
        F(batch), F(in_channels), F(in_height), F(in_width), F(out_channels), F(out_height), F(out_width), F(kernel_h), F(kernel_w),
        F(stride_h), F(stride_w), F(padding_h), F(padding_w), F(dilation_h), F(dilation_w), F(groups), F(x_element), F(y_element),
        F(weight_element), F(threads), F(activation), F(slope), F(weight_strides), F(x_pitch), F(x), F(weight), F(mean), F(scale), F(beta),
        F(gate)});
}

std::string join() {
    using S = Join;
    return described("Join", sizeof(S), {
        F(y), F(y_pitch), F(y_mean), F(y_scale), F(y_beta), F(gate), F(gate_pitch), F(image_pixels), F(r), F(r_pitch), F(r_mean), F(r_scale),
        F(r_beta), F(activation), F(slope)});
}

std::string forward() {
    using S = ForwardArguments;
    return described("ForwardArguments", sizeof(S), {F(problem), F(bias), F(y), F(y_pitch), F(y_mean), F(y_var), F(join)});
}

std::string backward() {
    using S = BackwardArguments;
    return described("BackwardArguments", sizeof(S), {
        F(problem), F(dy), F(dy_pitch), F(s), F(a), F(b), F(y), F(y_pitch), F(y_mean), F(dx), F(dx_pitch), F(accumulate), F(sum_p),
        F(sum_px), F(sum_pr), F(gate_gradient), F(weight_gradient), F(weight_gradient_strides), F(bias_gradient), F(gradient_factor),
        F(join)});
}

std::string sweep() {
    using S = SweepArguments;
    return described("SweepArguments", sizeof(S), {
        F(element), F(images), F(height), F(width), F(channels), F(threads), F(activation), F(slope), F(x), F(x_pitch), F(mean), F(scale),
        F(beta), F(gate), F(r), F(r_pitch), F(r_mean), F(r_scale), F(r_beta), F(z), F(z_pitch), F(z_mean), F(z_var), F(pooled), F(dz),
        F(dz_pitch), F(gradient_factor), F(s), F(a), F(b), F(dx), F(dx_pitch), F(accumulate), F(sum_p), F(sum_px), F(sum_pr),
        F(gate_gradient), F(kernel_h), F(kernel_w), F(stride_h), F(stride_w), F(padding_h), F(padding_w), F(out_height), F(out_width),
        F(index), F(index_pitch)});
}

std::string finalize() {
    using S = FinalizeArguments;
    return described("FinalizeArguments", sizeof(S), {
        F(channels), F(mean), F(var), F(unbias), F(momentum), F(eps), F(weight), F(bias), F(weight_element), F(bias_element),
        F(running_mean), F(running_var), F(running_mean_element), F(running_var_element), F(rstd), F(scale), F(beta), F(dscale), F(dbeta),
        F(of_mean), F(of_var), F(dmean), F(dvar), F(dweight)});
}

}  // namespace
}  // namespace bnr

BNR_EXPORT const char* bnr_layout() {
    using namespace bnr;
    static const std::string text = problem() + join() + forward() + backward() + sweep() + finalize();
    return text.c_str();
}
