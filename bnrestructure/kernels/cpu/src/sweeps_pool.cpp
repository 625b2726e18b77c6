// Max pooling of z = act(affine(x)), with the position of each maximum inside its window, and its backward. z is computed
// on the fly in both directions and never stored.
#include <limits>

#include "sweep.h"

namespace bnr::sweep {
namespace {

// One row of outputs. On a tie the first position wins, and a NaN beats everything before it, as in PyTorch.
template <Act A, class T>
BNR_FLATTEN void pool_row(const SweepArguments& a, int64_t out_row, const Affine& transform, Activation act) {
    const Pixels<const T> x(a.x, a.x_pitch);
    const Pixels<T> y(a.z, a.z_pitch);
    const int64_t image = out_row / a.out_height, top = out_row % a.out_height * a.stride_h - a.padding_h;
    const int64_t h0 = std::max<int64_t>(top, 0), h1 = std::min(top + a.kernel_h, a.height);
    for (int64_t ow = 0; ow < a.out_width; ow++) {
        const int64_t left = ow * a.stride_w - a.padding_w;
        const int64_t w0 = std::max<int64_t>(left, 0), w1 = std::min(left + a.kernel_w, a.width);
        const int64_t pixel = out_row * a.out_width + ow;
        for_each_vector(a.channels, [&](int64_t c, auto lanes) {
            const auto t = transform.at(c, lanes);
            vf best = set1(-std::numeric_limits<float>::infinity());
            vf at = set1(float((h0 - top) * a.kernel_w + w0 - left));
            for (int64_t h = h0; h < h1; h++) {
                const T* source = x.at((image * a.height + h) * a.width + w0, c);
                float position = float((h - top) * a.kernel_w + w0 - left);
                for (int64_t w = w0; w < w1; w++, source += x.ld, position += 1) {
                    const vf z = stored<T>(activate<A>(t(load(source, lanes)), act));
                    const vmask number = z == z;
                    at = select(number, select(z > best, set1(position), at), set1(position));
                    best = select(number, select(z > best, z, best), z);
                }
            }
            store(y.at(pixel, c), best, lanes);
            store_index(a.index + pixel * a.index_pitch + c, at, lanes);
        });
    }
}

// One row of inputs: each gathers from the windows it lies in, so no two threads write to one place.
template <Act A, class T>
BNR_FLATTEN void pool_row_gradient(const SweepArguments& a, const Input& to, int64_t row, Sums& sums) {
    const Pixels<const T> dy(a.dz, a.dz_pitch);
    const Pixels<const uint8_t> index(a.index, a.index_pitch);
    const InputGradient<A, T> input(to);
    const int64_t image = row / a.height, h = row % a.height + a.padding_h;
    const int64_t oh0 = std::max<int64_t>(0, (h - a.kernel_h + a.stride_h) / a.stride_h);
    const int64_t oh1 = std::min(a.out_height, h / a.stride_h + 1);
    for (int64_t column = 0; column < a.width; column++) {
        const int64_t w = column + a.padding_w;
        const int64_t ow0 = std::max<int64_t>(0, (w - a.kernel_w + a.stride_w) / a.stride_w);
        const int64_t ow1 = std::min(a.out_width, w / a.stride_w + 1);
        for_each_vector(a.channels, [&](int64_t c, auto lanes) {
            vf g = zero();
            for (int64_t oh = oh0; oh < oh1; oh++) {
                for (int64_t ow = ow0; ow < ow1; ow++) {
                    const int64_t pixel = (image * a.out_height + oh) * a.out_width + ow;
                    const float position = float((h - oh * a.stride_h) * a.kernel_w + w - ow * a.stride_w);
                    const vmask here = load(index.at(pixel, c), lanes) == set1(position);
                    g = g + select(here, load(dy.at(pixel, c), lanes), zero());
                }
            }
            input.block(row * a.width + column, c, lanes, 1, sums, [&](int) { return g; });
        });
    }
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

// x, its vectors and the activation to z and index.
BNR_EXPORT void bnr_max_pool_forward(const SweepArguments* a) {
    Scratch scratch;
    const int64_t rows = a->images * a->out_height;
    const int64_t threads = bnr::useful_threads(rows * a->out_width * a->channels, a->threads);
    const Activation act = activation(*a);
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    const auto kernel = kernel_for(a->element, act.kind, [](auto* type, auto kind) {
        return pool_row<kind.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        const Range own = share(rows, 1, t, threads);
        for (int64_t row = own.begin; row < own.end; row++) kernel(*a, row, transform, act);
    });
}

// dz, of z's size, and index to dx, sum_p and sum_px.
BNR_EXPORT void bnr_max_pool_backward(const SweepArguments* a) {
    Scratch scratch;
    const int64_t rows = a->images * a->height, threads = useful_threads(*a);
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    auto sums = per_thread<Sums>(scratch, threads, a->channels, int64_t(2));
    const Input input(*a, transform);
    const auto kernel = kernel_for(a->element, input.act.kind, [](auto* type, auto act) {
        return pool_row_gradient<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    const int64_t tile_rows = std::max<int64_t>(1, TILE_ROWS / a->width);
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        const Range all = share(rows, 1, t, threads);
        for (int64_t row = all.begin; row < all.end; row++) {
            kernel(*a, input, row, own);
            if ((row - all.begin + 1) % tile_rows == 0 || row + 1 == all.end) own.flush();
        }
    });
    write_sums(sums, *a);
}
