// Normalisation and activation as a sweep of their own, where no convolution can carry them.
#include "sweep.h"

namespace bnr::sweep {
namespace {

template <Act A, class T>
BNR_FLATTEN void normalise(Pixels<const T> x, Range rows, int64_t channels, const Affine& transform, Activation act,
                           Pixels<T> z) {
    for_each_block(rows, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const auto t = transform.at(c, lanes);
        for (int i = 0; i < n; i++) {
            request(x, r + i, c), request(z, r + i, c);
            store(z.at(r + i, c), activate<A>(t(load(x.at(r + i, c), lanes)), act), lanes);
        }
    });
}

template <Act A, class T>
BNR_FLATTEN void normalise_gradient(Pixels<const T> dz, const InputGradient<A, T>& input, Range tile, int64_t channels,
                                    Sums& sums) {
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
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation(act.kind, [&](auto a) {
            parallel(threads, [&](int64_t t) {
                normalise<a.value, T>({static_cast<const T*>(x), ldx}, share(rows, 1, t, threads), channels, transform,
                                      act, {static_cast<T*>(z), ldz});
            });
        });
    });
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
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_activation(act.kind, [&](auto a) {
            const InputGradient<a.value, T> input{
                {static_cast<const T*>(x), ldx}, transform, act, {static_cast<T*>(dx), lddx}, accumulate != 0};
            parallel(threads, [&](int64_t t) {
                Sums& own = sums[size_t(t)];
                for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
                    normalise_gradient<a.value, T>({static_cast<const T*>(dz), lddz}, input, tile, channels, own);
                    own.flush();
                });
            });
        });
    });
    write_sums(sums, sum_p, sum_px);
}
