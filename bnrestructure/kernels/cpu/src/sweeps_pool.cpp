// Max pooling of z = act(affine(x)), with the position of each maximum inside its window, and its backward. z is computed
// on the fly in both directions and never stored.
#include <limits>

#include "sweep.h"

namespace bnr::sweep {
namespace {

struct Window {
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

struct Extent {
    int64_t images, h, w, out_h, out_w;
};

// One row of outputs. On a tie the first position wins, and a NaN beats everything before it, as in PyTorch.
template <Act A, class T>
BNR_FLATTEN void pool_row(Pixels<const void> from, const Extent& e, const Window& k, int64_t out_row, int64_t channels,
                          const Affine& transform, Activation act, void* to, uint8_t* index) {
    const Pixels<const T> x(from);
    T* const y = static_cast<T*>(to);
    const int64_t image = out_row / e.out_h, top = out_row % e.out_h * k.stride_h - k.pad_h;
    const int64_t h0 = std::max<int64_t>(top, 0), h1 = std::min(top + k.kernel_h, e.h);
    for (int64_t ow = 0; ow < e.out_w; ow++) {
        const int64_t left = ow * k.stride_w - k.pad_w;
        const int64_t w0 = std::max<int64_t>(left, 0), w1 = std::min(left + k.kernel_w, e.w);
        const int64_t pixel = out_row * e.out_w + ow;
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            const auto t = transform.at(c, lanes);
            vf best = set1(-std::numeric_limits<float>::infinity());
            vf at = set1(float((h0 - top) * k.kernel_w + w0 - left));
            for (int64_t h = h0; h < h1; h++) {
                const T* source = x.at((image * e.h + h) * e.w + w0, c);
                float position = float((h - top) * k.kernel_w + w0 - left);
                for (int64_t w = w0; w < w1; w++, source += x.ld, position += 1) {
                    const vf z = stored<T>(activate<A>(t(load(source, lanes)), act));
                    const vmask number = z == z;
                    at = select(number, select(z > best, set1(position), at), set1(position));
                    best = select(number, select(z > best, z, best), z);
                }
            }
            store(y + pixel * channels + c, best, lanes);
            store_index(index + pixel * channels + c, at, lanes);
        });
    }
}

// One row of inputs: each gathers from the windows it lies in, so no two threads write to one place.
template <Act A, class T>
BNR_FLATTEN void pool_row_gradient(Pixels<const void> from, Pixels<const uint8_t> index, const Input& to, const Extent& e,
                                   const Window& k, int64_t row, int64_t channels, Sums& sums) {
    const Pixels<const T> dy(from);
    const InputGradient<A, T> input(to);
    const int64_t image = row / e.h, h = row % e.h + k.pad_h;
    const int64_t oh0 = std::max<int64_t>(0, (h - k.kernel_h + k.stride_h) / k.stride_h);
    const int64_t oh1 = std::min(e.out_h, h / k.stride_h + 1);
    for (int64_t column = 0; column < e.w; column++) {
        const int64_t w = column + k.pad_w;
        const int64_t ow0 = std::max<int64_t>(0, (w - k.kernel_w + k.stride_w) / k.stride_w);
        const int64_t ow1 = std::min(e.out_w, w / k.stride_w + 1);
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            vf g = zero();
            for (int64_t oh = oh0; oh < oh1; oh++) {
                for (int64_t ow = ow0; ow < ow1; ow++) {
                    const int64_t pixel = (image * e.out_h + oh) * e.out_w + ow;
                    const float position = float((h - oh * k.stride_h) * k.kernel_w + w - ow * k.stride_w);
                    const vmask here = load(index.at(pixel, c), lanes) == set1(position);
                    g = g + select(here, load(dy.at(pixel, c), lanes), zero());
                }
            }
            input.block(row * e.w + column, c, lanes, 1, sums, [&](int) { return g; });
        });
    }
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

// y and index have pitch `channels`.
BNR_EXPORT void bnr_max_pool_forward(int64_t element, int64_t kind, float slope, const void* x, int64_t ldx,
                                     int64_t images, int64_t h, int64_t w, int64_t channels, const float* mean,
                                     const float* scale, const float* beta, int64_t kernel_h, int64_t kernel_w,
                                     int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t out_h,
                                     int64_t out_w, void* y, uint8_t* index, int64_t threads) {
    Scratch scratch;
    const Extent extent{images, h, w, out_h, out_w};
    const Window window{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w};
    const int64_t rows = images * out_h;
    threads = useful_threads(rows * out_w * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine transform(scratch, channels, mean, scale, beta);
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return pool_row<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        const Range own = share(rows, 1, t, threads);
        for (int64_t row = own.begin; row < own.end; row++)
            kernel({x, ldx}, extent, window, row, channels, transform, act, y, index);
    });
}

BNR_EXPORT void bnr_max_pool_backward(int64_t element, int64_t kind, float slope, const void* dy, int64_t lddy,
                                      const uint8_t* index, int64_t ldindex, const void* x, int64_t ldx, int64_t images,
                                      int64_t h, int64_t w, int64_t channels, const float* mean, const float* scale,
                                      const float* beta, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                                      int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t out_h, int64_t out_w,
                                      void* dx, int64_t lddx, int64_t accumulate, float* sum_p, float* sum_px,
                                      int64_t threads) {
    Scratch scratch;
    const Extent extent{images, h, w, out_h, out_w};
    const Window window{kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w};
    const int64_t rows = images * h;
    threads = useful_threads(rows * w * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine transform(scratch, channels, mean, scale, beta);
    auto sums = per_thread<Sums>(scratch, threads, channels, int64_t(2));
    const Input input{{x, ldx}, transform, act, {dx, lddx}, accumulate != 0};
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return pool_row_gradient<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    const int64_t tile_rows = std::max<int64_t>(1, TILE_ROWS / w);
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        const Range all = share(rows, 1, t, threads);
        for (int64_t row = all.begin; row < all.end; row++) {
            kernel({dy, lddy}, {index, ldindex}, input, extent, window, row, channels, own);
            if ((row - all.begin + 1) % tile_rows == 0 || row + 1 == all.end) own.flush();
        }
    });
    write_sums(sums, sum_p, sum_px);
}
