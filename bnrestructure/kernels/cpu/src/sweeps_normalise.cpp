// Normalisation and activation as a sweep of their own, where no convolution can carry them.
#include "sweep.h"

namespace bnr::sweep {
namespace {

template <Act A, class T>
BNR_FLATTEN void normalise(Pixels<const void> from, Range rows, int64_t channels, const Affine& transform, Activation act,
                           Pixels<void> to) {
    const Pixels<const T> x(from);
    const Pixels<T> z(to);
    for_each_block(rows, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const auto t = transform.at(c, lanes);
        for (int i = 0; i < n; i++) {
            request(x, r + i, c), request(z, r + i, c);
            store(z.at(r + i, c), activate<A>(t(load(x.at(r + i, c), lanes)), act), lanes);
        }
    });
}

template <Act A, class T>
BNR_FLATTEN void normalise_gradient(Pixels<const void> from, const Input& to, Range tile, int64_t channels, Sums& sums) {
    const Pixels<const T> dz(from);
    const InputGradient<A, T> input(to);
    for_each_block(tile, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        input.block(r, c, lanes, n, sums, [&](int i) {
            request(dz, r + i, c);
            return load(dz.at(r + i, c), lanes);
        });
    });
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

BNR_EXPORT void bnr_normalise_forward(int64_t element, int64_t kind, float slope, const void* x, int64_t ldx,
                                      int64_t rows, int64_t channels, const float* mean, const float* scale,
                                      const float* beta, void* z, int64_t ldz, int64_t threads) {
    Scratch scratch;
    threads = useful_threads(rows * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine transform(scratch, channels, mean, scale, beta);
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return normalise<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) { kernel({x, ldx}, share(rows, 1, t, threads), channels, transform, act, {z, ldz}); });
}

BNR_EXPORT void bnr_normalise_backward(int64_t element, int64_t kind, float slope, const void* dz, int64_t lddz,
                                       const void* x, int64_t ldx, int64_t rows, int64_t channels, const float* mean,
                                       const float* scale, const float* beta, void* dx, int64_t lddx, int64_t accumulate,
                                       float* sum_p, float* sum_px, int64_t threads) {
    Scratch scratch;
    threads = useful_threads(rows * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine transform(scratch, channels, mean, scale, beta);
    auto sums = per_thread<Sums>(scratch, threads, channels, int64_t(2));
    const Input input{{x, ldx}, transform, act, {dx, lddx}, accumulate != 0};
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return normalise_gradient<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            kernel({dz, lddz}, input, tile, channels, own);
            own.flush();
        });
    });
    write_sums(sums, sum_p, sum_px);
}
