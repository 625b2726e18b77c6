// The residual join: normalise, add the (normalised) shortcut, activate; with the statistics of the sum where a batch norm
// follows.
#include "rounding.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

template <class T>
struct Operand {
    Pixels<const T> x;
    Affine transform;
};

template <Act A, class T>
BNR_FLATTEN void join(const Operand<T>& y, const Operand<T>& r, Range tile, int64_t channels, Activation act,
                      Pixels<T> out, Moments* moments) {
    for_each_block(tile, channels, [&](int64_t row, int64_t c, auto lanes, int n) {
        const auto ty = y.transform.at(c, lanes), tr = r.transform.at(c, lanes);
        const vf shift = moments ? load(moments->shift + c) : zero();
        vf sum = zero(), square = zero();
        for (int i = 0; i < n; i++) {
            request(y.x, row + i, c), request(r.x, row + i, c), request(out, row + i, c);
            const vf u = ty(load(y.x.at(row + i, c), lanes)) + tr(load(r.x.at(row + i, c), lanes));
            const vf result = activate<A>(u, act);
            store(out.at(row + i, c), result, lanes);
            const vf d = stored<T>(result) - shift;
            sum = sum + d;
            square = fma(d, d, square);
        }
        if (!moments) return;
        store(moments->sum + c, load(moments->sum + c) + sum);
        store(moments->square + c, load(moments->square + c) + square);
    });
}

// What dout gains where statistics of out were taken: a * (out - mean) + b.
template <class T>
struct StatisticsEdge {
    const float *a, *b, *mean;
    Pixels<const T> out;
};

template <Act A, class T>
BNR_FLATTEN void join_gradient(Pixels<const T> dout, const StatisticsEdge<T>& edge, const Operand<T>& y,
                               const Operand<T>& r, Range tile, int64_t channels, Activation act, Pixels<T> g, Sums& sums) {
    for_each_block(tile, channels, [&](int64_t row, int64_t c, auto lanes, int n) {
        const auto ty = y.transform.at(c, lanes), tr = r.transform.at(c, lanes);
        const bool has_edge = edge.a != nullptr;
        const vf a = has_edge ? load(edge.a + c, lanes) : zero(), b = has_edge ? load(edge.b + c, lanes) : zero();
        const vf mean = has_edge ? load(edge.mean + c, lanes) : zero();
        vf sp = zero(), spy = zero(), spr = zero();
        for (int i = 0; i < n; i++) {
            request(y.x, row + i, c), request(r.x, row + i, c), request(dout, row + i, c), request(g, row + i, c);
            const vf vy = load(y.x.at(row + i, c), lanes), vr = load(r.x.at(row + i, c), lanes);
            vf gradient = load(dout.at(row + i, c), lanes);
            if (has_edge) gradient = gradient + fma(a, load(edge.out.at(row + i, c), lanes) - mean, b);
            vf state;
            activate<A>(ty(vy) + tr(vr), act, state);
            const vf p = pull_back<A>(gradient, state, act);
            sp = sp + p;
            spy = fma(p, vy - ty.mean, spy);
            spr = fma(p, vr - tr.mean, spr);
            store(g.at(row + i, c), has_edge ? dithered<T>(p, row + i) : p, lanes);
        }
        store(sums[0] + c, load(sums[0] + c) + sp);
        store(sums[1] + c, load(sums[1] + c) + spy);
        store(sums[2] + c, load(sums[2] + c) + spr);
    });
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

BNR_EXPORT void bnr_residual_forward(int64_t element, int64_t kind, float slope, const void* y, int64_t ldy,
                                     const float* y_mean, const float* y_scale, const float* y_beta, const void* r,
                                     int64_t ldr, const float* r_mean, const float* r_scale, const float* r_beta,
                                     int64_t rows, int64_t channels, void* out, float* mean, float* var,
                                     int64_t threads) {
    Scratch scratch;
    threads = useful_threads(rows * channels, threads);
    const Activation act{Act(kind), slope};
    const Affine ty(scratch, channels, y_mean, y_scale, y_beta), tr(scratch, channels, r_mean, r_scale, r_beta);
    auto moments = per_thread<Moments>(scratch, mean ? threads : 0, channels);
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Operand<T> oy{{static_cast<const T*>(y), ldy}, ty}, orr{{static_cast<const T*>(r), ldr}, tr};
        const Pixels<T> result(static_cast<T*>(out), channels);
        with_activation(act.kind, [&](auto a) {
            parallel(threads, [&](int64_t t) {
                Moments* const own = mean ? &moments[size_t(t)] : nullptr;
                for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
                    if (own && own->is_empty()) {
                        // A first look at the result, for the shift: these few rows are computed twice.
                        const Range first{tile.begin, std::min(tile.end, tile.begin + SHIFT_ROWS)};
                        join<a.value, T>(oy, orr, first, channels, act, result, nullptr);
                        own->start(result.at(first.begin, 0), result.ld, first.size());
                    }
                    join<a.value, T>(oy, orr, tile, channels, act, result, own);
                    if (own) own->flush(tile.size());
                });
            });
        });
    });
    if (mean) merged(moments).write(mean, var);
}

// sum_py and sum_pr may be null. g has pitch `channels`.
BNR_EXPORT void bnr_residual_backward(int64_t element, int64_t kind, float slope, const void* dout, int64_t lddout,
                                      const float* a, const float* b, const float* mean, const void* out, int64_t ldout,
                                      const void* y, int64_t ldy, const float* y_mean, const float* y_scale,
                                      const float* y_beta, const void* r, int64_t ldr, const float* r_mean,
                                      const float* r_scale, const float* r_beta, int64_t rows, int64_t channels, void* g,
                                      float* sum_p, float* sum_py, float* sum_pr, int64_t threads) {
    Scratch scratch;
    threads = useful_threads(rows * channels, threads);
    const Activation activation{Act(kind), slope};
    const Affine ty(scratch, channels, y_mean, y_scale, y_beta), tr(scratch, channels, r_mean, r_scale, r_beta);
    auto sums = per_thread<Sums>(scratch, threads, channels, int64_t(3));
    with_element(element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Operand<T> oy{{static_cast<const T*>(y), ldy}, ty}, orr{{static_cast<const T*>(r), ldr}, tr};
        const StatisticsEdge<T> edge{a, b, mean, {static_cast<const T*>(out), ldout}};
        with_activation(activation.kind, [&](auto act) {
            parallel(threads, [&](int64_t t) {
                Sums& own = sums[size_t(t)];
                for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
                    join_gradient<act.value, T>({static_cast<const T*>(dout), lddout}, edge, oy, orr, tile, channels,
                                                activation, {static_cast<T*>(g), channels}, own);
                    own.flush();
                });
            });
        });
    });
    const Sums& total = merged(sums);
    total.write(0, sum_p);
    if (sum_py) total.write(1, sum_py);
    if (sum_pr) total.write(2, sum_pr);
}
