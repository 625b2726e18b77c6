// The squeeze of squeeze-and-excitation, or the global average pool before a classifier: the mean of z over each image.
#include "sweep.h"

namespace bnr::sweep {
namespace {

template <Act A, class T>
BNR_FLATTEN void add_tile(Pixels<const T> x, Range tile, int64_t channels, const Affine& transform, Activation act,
                          float* sum) {
    for_each_block(tile, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const auto t = transform.at(c, lanes);
        vf s = zero();
        for (int i = 0; i < n; i++) {
            request(x, r + i, c);
            s = s + activate<A>(t(load(x.at(r + i, c), lanes)), act);
        }
        store(sum + c, load(sum + c) + s);
    });
}

// Rows `tile` lie in one image, whose share of the average's gradient is `pooled`.
template <Act A, class T>
BNR_FLATTEN void squeeze_gradient(const float* pooled, Pixels<const T> dz, const InputGradient<A, T>& input, Range tile,
                                  int64_t channels, Sums& sums) {
    for_each_block(tile, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf average = load(pooled + c, lanes);
        if (dz)
            input.block(r, c, lanes, n, sums, [&](int i) {
                request(dz, r + i, c);
                return average + load(dz.at(r + i, c), lanes);
            });
        else
            input.block(r, c, lanes, n, sums, [&](int) { return average; });
    });
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

// x is [images * positions, channels]; pooled [images, channels].
BNR_EXPORT void bnr_squeeze_forward(int64_t element, int64_t kind, float slope, const void* x, int64_t ldx,
                                    int64_t images, int64_t positions, int64_t channels, const float* mean,
                                    const float* scale, const float* beta, float* pooled, int64_t threads) {
    threads = useful_threads(images * positions * channels, threads);
    // Whole images where there are enough of them, else parts of their channels.
    const int64_t parts = (threads + images - 1) / images, tasks = images * parts;
    const Activation act{Act(kind), slope};
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation(act.kind, [&](auto a) {
            parallel(threads, [&](int64_t t) {
                Scratch scratch;
                const Affine whole(scratch, channels, mean, scale, beta);
                Sums sums(scratch, channels, 1);
                const Range own = share(tasks, 1, t, threads);
                for (int64_t task = own.begin; task < own.end; task++) {
                    const int64_t image = task / parts;
                    const Range part = share(channels, W, task % parts, parts);
                    if (part.size() == 0) continue;
                    Affine transform = whole;
                    transform.mean += part.begin, transform.scale += part.begin, transform.beta += part.begin;
                    std::fill(sums.total, sums.total + sums.pitch, 0.0);
                    const Range rows{image * positions, (image + 1) * positions};
                    for_each_tile(rows, [&](Range tile) {
                        add_tile<a.value, T>({static_cast<const T*>(x) + part.begin, ldx}, tile, part.size(), transform,
                                             act, sums[0]);
                        sums.flush();
                    });
                    float* const out = pooled + image * channels + part.begin;
                    for (int64_t c = 0; c < part.size(); c++) out[c] = float(sums.total[c] / double(positions));
                }
            });
        });
    });
}

BNR_EXPORT void bnr_squeeze_backward(int64_t element, int64_t kind, float slope, const float* dpooled, const void* dz,
                                     int64_t lddz, const void* x, int64_t ldx, int64_t images, int64_t positions,
                                     int64_t channels, const float* mean, const float* scale, const float* beta, void* dx,
                                     int64_t lddx, int64_t accumulate, float* sum_p, float* sum_px, int64_t threads) {
    Scratch scratch;
    const int64_t rows = images * positions;
    threads = useful_threads(rows * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine transform(scratch, channels, mean, scale, beta);
    float* const average = scratch.take<float>(images * channels);
    for (int64_t i = 0; i < images * channels; i++) average[i] = dpooled[i] / float(positions);
    auto sums = per_thread<Sums>(scratch, threads, channels, int64_t(2));
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation(act.kind, [&](auto a) {
            const InputGradient<a.value, T> input{
                {static_cast<const T*>(x), ldx}, transform, act, {static_cast<T*>(dx), lddx}, accumulate != 0};
            parallel(threads, [&](int64_t t) {
                Sums& own = sums[size_t(t)];
                const Range all = share(rows, 1, t, threads);
                for (int64_t r = all.begin; r < all.end;) {
                    const int64_t image = r / positions;
                    const Range tile{r, std::min({all.end, (image + 1) * positions, r + TILE_ROWS})};
                    squeeze_gradient<a.value, T>(average + image * channels, {static_cast<const T*>(dz), lddz}, input,
                                                 tile, channels, own);
                    own.flush();
                    r = tile.end;
                }
            });
        });
    });
    write_sums(sums, sum_p, sum_px);
}
