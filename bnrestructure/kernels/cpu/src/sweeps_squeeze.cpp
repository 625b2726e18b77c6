// The squeeze of squeeze-and-excitation, or the global average pool before a classifier: the mean of z over each image.
#include "sweep.h"

namespace bnr::sweep {
namespace {

// Of the channels `part` alone.
template <Act A, class T>
BNR_FLATTEN void add_tile(const SweepArguments& a, Range tile, Range part, const Affine& transform, Activation act, float* sum) {
    const Pixels<const T> x(a.x, a.x_pitch);
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
BNR_FLATTEN void squeeze_gradient(const SweepArguments& a, const float* pooled, const Input& to, Range tile, Sums& sums) {
    const Pixels<const T> dz(a.dz, a.dz_pitch);
    const InputGradient<A, T> input(to);
    for_each_block(tile, a.channels, [&](int64_t r, int64_t c, auto lanes, int n) {
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

// x, its vectors and the activation to pooled.
BNR_EXPORT void bnr_squeeze_forward(const SweepArguments* a) {
    const int64_t images = a->images, positions = a->height * a->width, threads = useful_threads(*a);
    // Whole images where there are enough of them, else parts of their channels.
    const int64_t parts = (threads + images - 1) / images, tasks = images * parts;
    const Activation act = activation(*a);
    Scratch scratch;
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    const auto kernel = kernel_for(a->element, act.kind, [](auto* type, auto kind) {
        return add_tile<kind.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Scratch mine;
        Sums sums(mine, a->channels, 1);
        const Range own = share(tasks, 1, t, threads);
        for (int64_t task = own.begin; task < own.end; task++) {
            const int64_t image = task / parts;
            const Range part = share(a->channels, W, task % parts, parts);
            if (part.size() == 0) continue;
            std::fill(sums.total, sums.total + sums.pitch, 0.0);
            for_each_tile({image * positions, (image + 1) * positions}, [&](Range tile) {
                kernel(*a, tile, part, transform, act, sums[0]);
                sums.flush();
            });
            float* const out = a->pooled + image * a->channels + part.begin;
            for (int64_t c = 0; c < part.size(); c++) out[c] = float(sums.total[c] / double(positions));
        }
    });
}

// The gradient of pooled, and dz where z has other readers, to dx, sum_p and sum_px.
BNR_EXPORT void bnr_squeeze_backward(const SweepArguments* a) {
    Scratch scratch;
    const int64_t positions = a->height * a->width, rows = pixels(*a), elements = a->images * a->channels, threads = useful_threads(*a);
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    float* const average = scratch.take<float>(elements);
    for (int64_t i = 0; i < elements; i++) average[i] = a->pooled[i] / float(positions);
    auto sums = per_thread<Sums>(scratch, threads, a->channels, int64_t(2));
    const Input input(*a, transform);
    const auto kernel = kernel_for(a->element, input.act.kind, [](auto* type, auto act) {
        return squeeze_gradient<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        for_each_image_tile(*a, share(rows, 1, t, threads), [&](int64_t image, Range tile) {
            kernel(*a, average + image * a->channels, input, tile, own);
            own.flush();
        });
    });
    write_sums(sums, *a);
}
