// A convolution's output gradient from its backward edge, for a product that somebody else computes (kernels/hybrid.py).
#include "conv_pixels.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

// Pixels taken in one piece: few enough for the cache, and for float sums over them to be exact enough.
int64_t run_length(int64_t channels) { return std::clamp<int64_t>((64 << 10) / (4 * channels), 4, 256); }

template <class T>
void output_gradient(const SweepArguments& a) {
    const conv::OutputEdge edge{a.s, a.a, a.b, a.z_mean};
    const int64_t threads = a.threads, most = run_length(a.channels);
    Scratch scratch;
    auto bias = per_thread<Sums>(scratch, a.sum_p ? threads : 0, a.channels, int64_t(1));
    parallel(threads, [&](int64_t t) {
        const Range mine = share(pixels(a), 1, t, threads);
        for (int64_t pixel = mine.begin; pixel < mine.end; pixel += most) {
            const int64_t count = std::min(most, mine.end - pixel);
            const T* dz = static_cast<const T*>(a.dz) + pixel * a.dz_pitch;
            const T* z = static_cast<const T*>(a.z) + pixel * a.z_pitch;
            conv::output_gradient_pixels(dz, a.dz_pitch, z, a.z_pitch, count, a.channels, edge, float(a.gradient_factor),
                                         static_cast<T*>(a.dx) + pixel * a.dx_pitch, a.dx_pitch);
            if (!a.sum_p) continue;
            conv::add_output_gradient(dz, a.dz_pitch, z, a.z_pitch, count, a.channels, edge, bias[size_t(t)][0]);
            bias[size_t(t)].flush();
        }
    });
    if (a.sum_p) merged(bias).write(0, a.sum_p);
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;

// gradient_factor * (s * dz + a * (z - z_mean) + b) to dx, and its sum, without the factor, to sum_p where there is room for it.
BNR_EXPORT void bnr_output_gradient(const SweepArguments* a) {
    with_element(a->element, [&](auto* type) { sweep::output_gradient<std::remove_pointer_t<decltype(type)>>(*a); });
}
