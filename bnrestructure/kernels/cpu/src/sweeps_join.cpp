// The residual join as a sweep of its own, with the statistics of the sum where a batch norm follows.
#include "join_pixels.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

Join join_of(const SweepArguments& a) {
    return {a.x, a.x_pitch, a.mean, a.scale, a.beta, a.gate, a.channels, a.height * a.width,
            a.r, a.r_pitch, a.r_mean, a.r_scale, a.r_beta, a.activation, a.slope};
}

template <class T>
void join(const SweepArguments& a) {
    Scratch scratch;
    const int64_t rows = pixels(a), threads = useful_threads(a);
    const Join join = join_of(a);
    auto moments = per_thread<Moments>(scratch, a.z_mean ? threads : 0, a.channels);
    parallel(threads, [&](int64_t t) {
        Moments* const own = a.z_mean ? &moments[size_t(t)] : nullptr;
        for_each_tile(share(rows, 1, t, threads), [&](Range tile) {
            T* const z = static_cast<T*>(a.z) + tile.begin * a.z_pitch;
            if (own && own->is_empty()) {  // a first look at the result, for the shift: these few rows are computed twice
                const int64_t few = std::min(tile.size(), SHIFT_ROWS);
                join_pixels(join, tile.begin, few, a.channels, z, a.z_pitch);
                own->start(z, a.z_pitch, few);
            }
            join_pixels(join, tile.begin, tile.size(), a.channels, z, a.z_pitch, own);
            if (own) own->flush(tile.size());
        });
    });
    if (a.z_mean) merged(moments).write(a.z_mean, a.z_var);
}

template <class T>
void join_gradient(const SweepArguments& a) {
    Scratch scratch;
    const int64_t threads = useful_threads(a);
    const Join join = join_of(a);
    const StatisticsEdge edge{a.a, a.b, a.z_mean, a.z, a.z_pitch};
    auto sums = per_thread<Sums>(scratch, threads, a.channels, int64_t(3));
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        for_each_tile(share(pixels(a), 1, t, threads), [&](Range tile) {
            join_gradient_pixels(static_cast<const T*>(a.dz) + tile.begin * a.dz_pitch, a.dz_pitch, join, tile.begin, 0, tile.size(),
                                 a.channels, float(a.gradient_factor), static_cast<T*>(a.dx) + tile.begin * a.dx_pitch, a.dx_pitch,
                                 a.accumulate != 0, {own[0], own[1], own[2]}, a.a ? &edge : nullptr);
            own.flush();
        });
    });
    write_sums(sums, a);
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;

// x, r, their vectors, the gate and the activation to z, and z's statistics where there is room for them.
BNR_EXPORT void bnr_join_forward(const SweepArguments* a) {
    with_element(a->element, [&](auto* type) { sweep::join<std::remove_pointer_t<decltype(type)>>(*a); });
}

// dz (and a, b, z and its mean) to dx, the gradient at the sum, and sum_p, sum_px, sum_pr.
BNR_EXPORT void bnr_join_backward(const SweepArguments* a) {
    with_element(a->element, [&](auto* type) { sweep::join_gradient<std::remove_pointer_t<decltype(type)>>(*a); });
}
