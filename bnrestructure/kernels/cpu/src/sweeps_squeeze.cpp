// The squeeze of squeeze-and-excitation, or the global average pool before a classifier: the mean of z over each image.
#include "sweep.h"

namespace bnr::sweep {
namespace {

// Of the channels `part` alone.
template <Act A, class T>
BNR_FLATTEN void add_tile(Pixels<const void> from, Range tile, Range part, const Affine& transform, Activation act,
                          float* sum) {
    const Pixels<const T> x(from);
    for_each_block(tile, part.size(), [&](int64_t r, int64_t c, auto lanes, int n) {
        const int64_t channel = part.begin + c;
        const auto t = transform.at(channel, lanes);
        vf s = zero();
        for (int i = 0; i < n; i++) {
            request(x, r + i, channel);
            s = s + activate<A>(t(load(x.at(r + i, channel), lanes)), act);
        }
        store(sum + c, load(sum + c) + s);
    });
}

// Rows `tile` lie in one image, whose share of the average's gradient is `pooled`: the same for all its pixels, and so is its rounding.
template <Act A, class T>
BNR_FLATTEN void squeeze_gradient(const float* pooled, Pixels<const void> from, const Input& to, Range tile,
                                  int64_t channels, Sums& sums) {
    const Pixels<const T> dz(from);
    const InputGradient<A, T> input(to);
    for_each_block(tile, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf average = load(pooled + c, lanes);
        if (dz)
            input.template block<true>(r, c, lanes, n, sums, [&](int i) {
                request(dz, r + i, c);
                return average + load(dz.at(r + i, c), lanes);
            });
        else
            input.template block<true>(r, c, lanes, n, sums, [&](int) { return average; });
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
    Scratch scratch;
    const Affine transform(scratch, channels, mean, scale, beta);
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return add_tile<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Scratch mine;
        Sums sums(mine, channels, 1);
        const Range own = share(tasks, 1, t, threads);
        for (int64_t task = own.begin; task < own.end; task++) {
            const int64_t image = task / parts;
            const Range part = share(channels, W, task % parts, parts);
            if (part.size() == 0) continue;
            std::fill(sums.total, sums.total + sums.pitch, 0.0);
            for_each_tile({image * positions, (image + 1) * positions}, [&](Range tile) {
                kernel({x, ldx}, tile, part, transform, act, sums[0]);
                sums.flush();
            });
            float* const out = pooled + image * channels + part.begin;
            for (int64_t c = 0; c < part.size(); c++) out[c] = float(sums.total[c] / double(positions));
        }
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
    const Input input{{x, ldx}, transform, act, {dx, lddx}, accumulate != 0};
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return squeeze_gradient<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        const Range all = share(rows, 1, t, threads);
        for (int64_t r = all.begin; r < all.end;) {
            const int64_t image = r / positions;
            const Range tile{r, std::min({all.end, (image + 1) * positions, r + TILE_ROWS})};
            kernel(average + image * channels, {dz, lddz}, input, tile, channels, own);
            own.flush();
            r = tile.end;
        }
    });
    write_sums(sums, sum_p, sum_px);
}
