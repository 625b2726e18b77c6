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
void statistics(const SweepArguments& a) {
    Scratch scratch;
    const Pixels<const T> x(a.x, a.x_pitch);
    const int64_t rows = pixels(a), threads = useful_threads(a);
    auto moments = per_thread<Moments>(scratch, threads, a.channels);
    parallel(threads, [&](int64_t t) {
        Moments& m = moments[size_t(t)];
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            if (m.is_empty()) m.start(x.at(tile.begin, 0), x.ld, std::min(tile.size(), SHIFT_ROWS));
            add_tile(x, tile, m);
            m.flush(tile.size());
        });
    });
    merged(moments).write(a.z_mean, a.z_var);
}

template <class T>
BNR_FLATTEN void statistics_gradient(const SweepArguments& a, Range rows) {
    const Pixels<const T> x(a.x, a.x_pitch);
    const Pixels<T> dx(a.dx, a.dx_pitch);
    const bool accumulate = a.accumulate != 0;
    for_each_block(rows, a.channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf vmean = load(a.z_mean + c, lanes), va = load(a.a + c, lanes), vb = load(a.b + c, lanes);
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

// Statistics of x, to z_mean and z_var.
BNR_EXPORT void bnr_statistics_forward(const SweepArguments* a) {
    with_element(a->element, [&](auto* type) { statistics<std::remove_pointer_t<decltype(type)>>(*a); });
}

// a * (x - z_mean) + b to dx.
BNR_EXPORT void bnr_statistics_backward(const SweepArguments* a) {
    const int64_t threads = useful_threads(*a);
    with_element(a->element, [&](auto* type) {
        parallel(threads, [&](int64_t t) {
            statistics_gradient<std::remove_pointer_t<decltype(type)>>(*a, share(pixels(*a), 1, t, threads));
        });
    });
}
