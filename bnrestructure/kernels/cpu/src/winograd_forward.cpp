// The fused 3x3 convolution, forward, by Winograd's algorithm: prologue, transform, 16 products, transform back, statistics.
#include <memory>

#include "conv_pixels.h"
#include "library.h"
#include "statistics.h"
#include "winograd_rows.h"

namespace bnr::winograd {

namespace {

void forward(const ForwardArguments& a) {
    const Problem& p = a.problem;
    const Plane in{p.in_height, p.in_width, p.in_channels}, out{p.out_height, p.out_width, p.out_channels};
    const TileRows rows(out, p.batch);
    Scratch scratch;
    const conv::Grouping grouping(p, INT64_MAX);
    const conv::PackedWeight weight = transform_weight(p, grouping, false, scratch);
    const int64_t threads = std::min(p.threads, rows.count);
    std::vector<std::unique_ptr<Moments>> moments;
    for (int64_t t = 0; a.y_mean && t < threads; t++) moments.push_back(std::make_unique<Moments>(scratch, p.out_channels));
    const float* x = static_cast<const float*>(p.x);
    parallel(threads, [&](int64_t t) {
        Scratch own;
        Moments* m = a.y_mean ? moments[size_t(t)].get() : nullptr;
        bool started = false;
        Convolution(own, in, out, rows, p.padding_h, p.padding_w, weight, grouping.groups).run(
            share(rows.count, 1, t, threads),
            [&](int64_t image, int64_t row, float* to, int64_t pitch) {
                const int64_t pixel = (image * in.height + row) * in.width;
                conv::transform_pixels(x + pixel * p.x_pitch, p.x_pitch, in.width, in.channels, conv::transform_at(p, image, 0), to,
                                       pitch);
            },
            [&](int64_t image, int64_t row, const float* from, int64_t pitch) {
                float* y = static_cast<float*>(a.y) + (image * out.height + row) * out.width * a.y_pitch;
                if (m && started) {
                    conv::finish_output_pixels(from, pitch, out.width, out.channels, a.bias, y, a.y_pitch, m->shift, m->sum,
                                               m->square);
                    return;
                }
                conv::finish_output_pixels(from, pitch, out.width, out.channels, a.bias, y, a.y_pitch);
                if (!m) return;
                m->start(y, a.y_pitch, out.width);   // this row's mean is the shift of the first rows
                started = true;
                add_moments(y, a.y_pitch, out.width, out.channels, m->shift, m->sum, m->square);
            },
            [&](int64_t pixels) {
                if (m) m->flush(pixels);
            },
            [&](Range next, gemm::Prefetch& prefetch) { request(p.x, p.x_pitch, p.batch, in, rows, next, prefetch); });
    });
    if (!a.y_mean) return;
    for (int64_t t = 1; t < threads; t++) moments[0]->merge(*moments[size_t(t)]);
    moments[0]->write(a.y_mean, a.y_var);
}

}  // namespace

}  // namespace bnr::winograd

BNR_EXPORT void bnr_winograd_forward(const bnr::ForwardArguments* arguments) { bnr::winograd::forward(*arguments); }
