// Batch statistics of a tensor and their backward, where neither rides on a convolution.
#include "rounding.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

template <class T>
BNR_FLATTEN void add_tile(Pixels<const T> x, Range tile, Moments& m) {
    for_each_block(tile, m.channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf shift = load(m.shift + c);
        vf sum = zero(), square = zero();
        for (int i = 0; i < n; i++) {
            request(x, r + i, c);
            const vf d = load(x.at(r + i, c), lanes) - shift;
            sum = sum + d;
            square = fma(d, d, square);
        }
        store(m.sum + c, load(m.sum + c) + sum);
        store(m.square + c, load(m.square + c) + square);
    });
}

template <class T>
void statistics(Pixels<const T> x, int64_t rows, int64_t channels, float* mean, float* var, int64_t threads) {
    Scratch scratch;
    threads = useful_threads(rows * channels, threads);
    auto moments = per_thread<Moments>(scratch, threads, channels);
    parallel(threads, [&](int64_t t) {
        Moments& m = moments[size_t(t)];
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            if (m.is_empty()) m.start(x.at(tile.begin, 0), x.ld, std::min(tile.size(), SHIFT_ROWS));
            add_tile(x, tile, m);
            m.flush(tile.size());
        });
    });
    merged(moments).write(mean, var);
}

template <class T>
BNR_FLATTEN void statistics_gradient(Pixels<const T> x, Range rows, int64_t channels, const float* mean, const float* a,
                                     const float* b, Pixels<T> dx, bool accumulate) {
    for_each_block(rows, channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf vmean = load(mean + c, lanes), va = load(a + c, lanes), vb = load(b + c, lanes);
        for (int i = 0; i < n; i++) {
            request(x, r + i, c), request(dx, r + i, c);
            T* const target = dx.at(r + i, c);
            vf d = fma(va, load(x.at(r + i, c), lanes) - vmean, vb);
            if (accumulate) d = dithered<T>(d + load(target, lanes), r + i);
            store(target, d, lanes);
        }
    });
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

BNR_EXPORT void bnr_statistics_forward(int64_t element, const void* x, int64_t ldx, int64_t rows, int64_t channels,
                                       float* mean, float* var, int64_t threads) {
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        statistics<T>({static_cast<const T*>(x), ldx}, rows, channels, mean, var, threads);
    });
}

BNR_EXPORT void bnr_statistics_backward(int64_t element, const void* x, int64_t ldx, int64_t rows, int64_t channels,
                                        const float* mean, const float* a, const float* b, void* dx, int64_t lddx,
                                        int64_t accumulate, int64_t threads) {
    threads = useful_threads(rows * channels, threads);
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        parallel(threads, [&](int64_t t) {
            statistics_gradient<T>({static_cast<const T*>(x), ldx}, share(rows, 1, t, threads), channels, mean, a, b,
                                   {static_cast<T*>(dx), lddx}, accumulate != 0);
        });
    });
}
