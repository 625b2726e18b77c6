// The residual join: normalise, add the (normalised) shortcut, activate; with the statistics of the sum where a batch norm
// follows.
#include "rounding.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

struct Operand {
    Pixels<const void> x;
    const Affine& transform;
};

template <Act A, class T>
BNR_FLATTEN void join(const Operand& left, const Operand& right, Range tile, int64_t channels, Activation act,
                      Pixels<void> to, Moments* moments) {
    const Pixels<const T> y(left.x), r(right.x);
    const Pixels<T> out(to);
    for_each_block(tile, channels, [&](int64_t row, int64_t c, auto lanes, int n) {
        const auto ty = left.transform.at(c, lanes), tr = right.transform.at(c, lanes);
        const vf shift = moments ? load(moments->shift + c) : zero();
        vf sum = zero(), square = zero();
        for (int i = 0; i < n; i++) {
            request(y, row + i, c), request(r, row + i, c), request(out, row + i, c);
            const vf u = ty(load(y.at(row + i, c), lanes)) + tr(load(r.at(row + i, c), lanes));
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

// A thread's first look at the result, for the shift: these few rows are computed twice.
template <class T>
void start_moments(Pixels<const void> result, Range rows, Moments& moments) {
    const Pixels<const T> out(result);
    moments.start(out.at(rows.begin, 0), out.ld, rows.size());
}

// What dout gains where statistics of out were taken: a * (out - mean) + b.
struct StatisticsEdge {
    const float *a, *b, *mean;
    Pixels<const void> out;
};

template <Act A, class T>
BNR_FLATTEN void join_gradient(Pixels<const void> from, const StatisticsEdge& edge, const Operand& left,
                               const Operand& right, Range tile, int64_t channels, Activation act, Pixels<void> to,
                               Sums& sums) {
    const Pixels<const T> dout(from), out(edge.out), y(left.x), r(right.x);
    const Pixels<T> g(to);
    for_each_block(tile, channels, [&](int64_t row, int64_t c, auto lanes, int n) {
        const auto ty = left.transform.at(c, lanes), tr = right.transform.at(c, lanes);
        const bool has_edge = edge.a != nullptr;
        const vf a = has_edge ? load(edge.a + c, lanes) : zero(), b = has_edge ? load(edge.b + c, lanes) : zero();
        const vf mean = has_edge ? load(edge.mean + c, lanes) : zero();
        vf sp = zero(), spy = zero(), spr = zero();
        for (int i = 0; i < n; i++) {
            request(y, row + i, c), request(r, row + i, c), request(dout, row + i, c), request(g, row + i, c);
            const vf vy = load(y.at(row + i, c), lanes), vr = load(r.at(row + i, c), lanes);
            vf gradient = load(dout.at(row + i, c), lanes);
            if (has_edge) gradient = gradient + fma(a, load(out.at(row + i, c), lanes) - mean, b);
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
    const Operand left{{y, ldy}, ty}, right{{r, ldr}, tr};
    const auto kernel = kernel_for(element, act.kind, [](auto* type, auto a) {
        return join<a.value, std::remove_pointer_t<decltype(type)>>;
    });
    auto* start = start_moments<float>;
    with_element(element, [&](auto* type) { start = start_moments<std::remove_pointer_t<decltype(type)>>; });
    parallel(threads, [&](int64_t t) {
        Moments* const own = mean ? &moments[size_t(t)] : nullptr;
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            if (own && own->is_empty()) {
                const Range first{tile.begin, std::min(tile.end, tile.begin + SHIFT_ROWS)};
                kernel(left, right, first, channels, act, {out, channels}, nullptr);
                start({out, channels}, first, *own);
            }
            kernel(left, right, tile, channels, act, {out, channels}, own);
            if (own) own->flush(tile.size());
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
    const Operand left{{y, ldy}, ty}, right{{r, ldr}, tr};
    const StatisticsEdge edge{a, b, mean, {out, ldout}};
    const auto kernel = kernel_for(element, activation.kind, [](auto* type, auto act) {
        return join_gradient<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            kernel({dout, lddout}, edge, left, right, tile, channels, activation, {g, channels}, own);
            own.flush();
        });
    });
    const Sums& total = merged(sums);
    total.write(0, sum_p);
    if (sum_py) total.write(1, sum_py);
    if (sum_pr) total.write(2, sum_pr);
}
