// The same prologues and epilogues as sweeps of their own, around a convolution that somebody else computes
// (convolution_hybrid.py). The argument structures are those of the fused kernels, and only what a sweep needs is read.
#include <memory>

#include "conv_geometry.h"
#include "conv_pixels.h"
#include "library.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

// Pixels that every loop takes in one piece: few enough for the cache, and for float sums over them to be exact enough.
int64_t run_length(int64_t channels) { return std::clamp<int64_t>((64 << 10) / (4 * channels), 4, 256); }

// f(thread, image, first pixel, pixels) over runs that lie within an image; pixels count from the tensor's start.
template <class F>
void for_each_piece(int64_t images, int64_t image_pixels, int64_t channels, int64_t threads, F&& f) {
    const int64_t most = run_length(channels);
    parallel(threads, [&](int64_t t) {
        const Range mine = share(images * image_pixels, 1, t, threads);
        for (int64_t pixel = mine.begin; pixel < mine.end;) {
            const int64_t image = pixel / image_pixels;
            const int64_t end = std::min({mine.end, pixel + most, (image + 1) * image_pixels});
            f(t, image, pixel, end - pixel);
            pixel = end;
        }
    });
}

// z = act(...) * gate, to `y`, which here has x's shape.
template <class T>
void prologue(const ForwardArguments& a) {
    const Problem& p = a.problem;
    for_each_piece(p.batch, p.in_height * p.in_width, p.in_channels, p.threads,
                   [&](int64_t, int64_t image, int64_t pixel, int64_t count) {
                       transform_pixels(static_cast<const T*>(p.x) + pixel * p.x_pitch, p.x_pitch, count, p.in_channels,
                                        transform_at(p, image, 0), static_cast<T*>(a.y) + pixel * a.y_pitch, a.y_pitch);
                   });
}

// Statistics of y.
template <class T>
void statistics(const ForwardArguments& a) {
    const Problem& p = a.problem;
    Scratch scratch;
    std::vector<Moments> moments;
    for (int64_t t = 0; t < p.threads; t++) moments.emplace_back(scratch, p.out_channels);
    for_each_piece(1, p.batch * p.out_height * p.out_width, p.out_channels, p.threads,
                   [&](int64_t t, int64_t, int64_t pixel, int64_t count) {
                       const T* y = static_cast<const T*>(a.y) + pixel * a.y_pitch;
                       Moments& m = moments[t];
                       if (m.is_empty()) m.start(y, a.y_pitch, count);
                       add_moments(y, a.y_pitch, count, p.out_channels, m.shift, m.sum, m.square);
                       m.flush(count);
                   });
    Moments& all = moments[0];
    for (int64_t t = 1; t < p.threads; t++) all.merge(moments[t]);
    all.write(a.y_mean, a.y_var);
}

// dY to `dx`, which here has y's shape, and the bias gradient.
template <class T>
void output_gradient(const BackwardArguments& a) {
    const Problem& p = a.problem;
    const OutputEdge edge{a.s, a.a, a.b, a.y_mean};
    Scratch scratch;
    std::vector<Sums> bias;
    for (int64_t t = 0; a.bias_gradient && t < p.threads; t++) bias.emplace_back(scratch, p.out_channels, 1);
    for_each_piece(1, p.batch * p.out_height * p.out_width, p.out_channels, p.threads,
                   [&](int64_t t, int64_t, int64_t pixel, int64_t count) {
                       const T* dy = static_cast<const T*>(a.dy) + pixel * a.dy_pitch;
                       const T* y = static_cast<const T*>(a.y) + pixel * a.y_pitch;
                       output_gradient_pixels(dy, a.dy_pitch, y, a.y_pitch, count, p.out_channels, edge, static_cast<float>(a.gradient_factor),
                                              static_cast<T*>(a.dx) + pixel * a.dx_pitch, a.dx_pitch);
                       if (!a.bias_gradient) return;
                       add_output_gradient(dy, a.dy_pitch, y, a.y_pitch, count, p.out_channels, edge, bias[t][0]);
                       bias[t].flush();
                   });
    for (std::size_t t = 1; t < bias.size(); t++) bias[0].merge(bias[t]);
    if (a.bias_gradient) bias[0].write(0, a.bias_gradient);
}

// From the gradient at z, in `dy` and of x's shape, to dx and the sums.
template <class T>
void input_gradient(const BackwardArguments& a) {
    const Problem& p = a.problem;
    const int64_t channels = p.in_channels, pitch = padded(channels), gates = p.gate ? p.batch * channels : 0;
    Scratch scratch;
    std::vector<Sums> sums;
    std::vector<float*> sum_gate, g;
    std::vector<double*> gate;
    for (int64_t t = 0; t < p.threads; t++) {
        sums.emplace_back(scratch, channels, a.join.y ? 3 : 2);
        sum_gate.push_back(scratch.zeros<float>(pitch));
        gate.push_back(scratch.zeros<double>(gates));
        g.push_back(p.bfloat16 ? scratch.take<float>(run_length(channels) * pitch) : nullptr);
    }
    for_each_piece(p.batch, p.in_height * p.in_width, channels, p.threads,
                   [&](int64_t t, int64_t image, int64_t pixel, int64_t count) {
        const T* dz = static_cast<const T*>(a.dy) + pixel * a.dy_pitch;
        const float* from = reinterpret_cast<const float*>(dz);
        int64_t from_pitch = a.dy_pitch;
        if (g[t]) {
            const InputTransform none{nullptr, nullptr, nullptr, {Act::identity, 0.0f}, nullptr};
            transform_pixels(dz, a.dy_pitch, count, channels, none, g[t], pitch);
            from = g[t], from_pitch = pitch;
        }
        const T* x = static_cast<const T*>(p.x) + pixel * p.x_pitch;
        T* dx = static_cast<T*>(a.dx) + pixel * a.dx_pitch;
        const InputTransform transform = transform_at(p, image, 0);
        const auto factor = static_cast<float>(1 / a.gradient_factor);
        if (p.gate) {
            gated_gradient_pixels(from, from_pitch, x, p.x_pitch, count, channels, transform, factor, dx, a.dx_pitch,
                                  a.accumulate != 0, sum_gate[t]);
            for (int64_t c = 0; c < channels; c++) gate[t][image * channels + c] += sum_gate[t][c], sum_gate[t][c] = 0;
        } else if (a.join.y) {
            join_gradient_pixels(from, from_pitch, a.join, pixel, 0, count, channels, factor, dx, a.dx_pitch, a.accumulate != 0,
                                 {sums[t][0], sums[t][1], sums[t][2]});
            sums[t].flush();
        } else {
            input_gradient_pixels(from, from_pitch, x, p.x_pitch, count, channels, transform, factor, dx, a.dx_pitch,
                                  a.accumulate != 0, sums[t][0], sums[t][1]);
            sums[t].flush();
        }
    });
    for (int64_t t = 1; t < p.threads; t++) {
        sums[0].merge(sums[t]);
        for (int64_t i = 0; i < gates; i++) gate[0][i] += gate[t][i];
    }
    if (a.sum_p) sums[0].write(0, a.sum_p), sums[0].write(1, a.sum_px);
    if (a.sum_pr) sums[0].write(2, a.sum_pr);
    for (int64_t i = 0; i < gates; i++) a.gate_gradient[i] = static_cast<float>(gate[0][i]);
}

}  // namespace

}  // namespace bnr::conv

using bnr::conv::BackwardArguments;
using bnr::conv::ForwardArguments;

BNR_EXPORT void bnr_conv_prologue(const ForwardArguments* a) {
    a->problem.bfloat16 ? bnr::conv::prologue<bnr::bf16>(*a) : bnr::conv::prologue<float>(*a);
}

BNR_EXPORT void bnr_conv_statistics(const ForwardArguments* a) {
    a->problem.bfloat16 ? bnr::conv::statistics<bnr::bf16>(*a) : bnr::conv::statistics<float>(*a);
}

BNR_EXPORT void bnr_conv_output_gradient(const BackwardArguments* a) {
    a->problem.bfloat16 ? bnr::conv::output_gradient<bnr::bf16>(*a) : bnr::conv::output_gradient<float>(*a);
}

BNR_EXPORT void bnr_conv_input_gradient(const BackwardArguments* a) {
    a->problem.bfloat16 ? bnr::conv::input_gradient<bnr::bf16>(*a) : bnr::conv::input_gradient<float>(*a);
}
