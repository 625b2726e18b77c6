// Normalisation, activation and gate as a sweep of their own, where no convolution can carry them.
#include "conv_pixels.h"
#include "sweep.h"

namespace bnr::sweep {
namespace {

// Rows that lie in one image, where there is a gate.
template <Act A, class T>
BNR_FLATTEN void normalise(const SweepArguments& a, Range rows, const Affine& transform, Activation act, const float* gate) {
    const Pixels<const T> x(a.x, a.x_pitch), added(a.r, a.r_pitch);
    const Pixels<T> z(a.z, a.z_pitch);
    for_each_block(rows, a.channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const auto t = transform.at(c, lanes);
        const vf factor = gate ? load(gate + c, lanes) : set1(1.0f);
        const auto made = [&](int i) { return activate<A>(t(load(x.at(r + i, c), lanes)), act); };
        if (added) {
            for (int i = 0; i < n; i++) {
                request(x, r + i, c), request(added, r + i, c), request(z, r + i, c);
                store(z.at(r + i, c), fma(made(i), factor, load(added.at(r + i, c), lanes)), lanes);
            }
        } else {
            for (int i = 0; i < n; i++) {
                request(x, r + i, c), request(z, r + i, c);
                store(z.at(r + i, c), made(i) * factor, lanes);
            }
        }
    });
}

// Rows that lie in one image, where that has factors.
template <Act A, class T>
BNR_FLATTEN void normalise_gradient(const SweepArguments& a, const Input& to, Range tile, const float* factors, Sums& sums) {
    const Pixels<const T> dz(a.dz, a.dz_pitch);
    const InputGradient<A, T> input(to);
    for_each_block(tile, a.channels, [&](int64_t r, int64_t c, auto lanes, int n) {
        const vf common = set1(float(a.gradient_factor));
        const vf factor = factors ? load(factors + c, lanes) * common : common;
        input.block(r, c, lanes, n, sums, [&](int i) {
            request(dz, r + i, c);
            return load(dz.at(r + i, c), lanes) * factor;
        });
    });
}

// With a gate: dx = dz * gate, the mask not applied, and the gate's gradient.
template <class T>
void gate_gradient(const SweepArguments& a) {
    Scratch scratch;
    const int64_t threads = useful_threads(a), channels = a.channels, pitch = padded(channels);
    const conv::InputTransform plain{nullptr, nullptr, nullptr, {Act::identity, 0.0f}, nullptr};
    std::vector<double*> gates;
    std::vector<float*> sums, gradients;
    for (int64_t t = 0; t < threads; t++) {
        gates.push_back(scratch.zeros<double>(a.images * channels));
        sums.push_back(scratch.zeros<float>(pitch));
        gradients.push_back(scratch.take<float>(TILE_ROWS * pitch));
    }
    parallel(threads, [&](int64_t t) {
        for_each_image_tile(a, share(pixels(a), 1, t, threads), [&](int64_t image, Range tile) {
            const conv::InputTransform transform{a.mean, a.scale, a.beta, activation(a), a.gate + image * channels};
            conv::transform_pixels(static_cast<const T*>(a.dz) + tile.begin * a.dz_pitch, a.dz_pitch, tile.size(), channels, plain,
                                   gradients[size_t(t)], pitch);
            conv::gated_gradient_pixels(gradients[size_t(t)], pitch, static_cast<const T*>(a.x) + tile.begin * a.x_pitch, a.x_pitch,
                                        tile.size(), channels, transform, float(a.gradient_factor),
                                        static_cast<T*>(a.dx) + tile.begin * a.dx_pitch, a.dx_pitch, a.accumulate != 0, sums[size_t(t)]);
            for (int64_t c = 0; c < channels; c++) gates[size_t(t)][image * channels + c] += sums[size_t(t)][c], sums[size_t(t)][c] = 0;
        });
    });
    for (int64_t i = 0; i < a.images * channels; i++) {
        double total = 0;
        for (int64_t t = 0; t < threads; t++) total += gates[size_t(t)][i];
        a.gate_gradient[i] = float(total);
    }
}

}  // namespace
}  // namespace bnr::sweep

using namespace bnr;
using namespace bnr::sweep;

// x, its vectors, the activation, the gate and r to z.
BNR_EXPORT void bnr_normalise_forward(const SweepArguments* a) {
    Scratch scratch;
    const int64_t threads = useful_threads(*a);
    const Activation act = activation(*a);
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    const auto kernel = kernel_for(a->element, act.kind, [](auto* type, auto kind) {
        return normalise<kind.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        const Range rows = share(pixels(*a), 1, t, threads);
        if (!a->gate) return kernel(*a, rows, transform, act, nullptr);
        for_each_image_tile(*a, rows, [&](int64_t image, Range tile) {
            kernel(*a, tile, transform, act, a->gate + image * a->channels);
        });
    });
}

// dz to dx, and sum_p and sum_px or, where that of a gate is wanted, gate_gradient. Any other gate is a part of the gradient at z.
BNR_EXPORT void bnr_normalise_backward(const SweepArguments* a) {
    if (a->gate_gradient) {
        with_element(a->element, [&](auto* type) { gate_gradient<std::remove_pointer_t<decltype(type)>>(*a); });
        return;
    }
    Scratch scratch;
    const int64_t threads = useful_threads(*a);
    const Affine transform(scratch, a->channels, a->mean, a->scale, a->beta);
    auto sums = per_thread<Sums>(scratch, threads, a->channels, int64_t(2));
    const Input input(*a, transform);
    const auto kernel = kernel_for(a->element, input.act.kind, [](auto* type, auto act) {
        return normalise_gradient<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    parallel(threads, [&](int64_t t) {
        Sums& own = sums[size_t(t)];
        const Range rows = share(pixels(*a), 1, t, threads);
        const auto sweep = [&](Range tile, const float* factors) {
            kernel(*a, input, tile, factors, own);
            own.flush();
        };
        if (a->gate) {
            for_each_image_tile(*a, rows, [&](int64_t image, Range tile) { sweep(tile, a->gate + image * a->channels); });
        } else {
            for_each_tile(rows, [&](Range tile) { sweep(tile, nullptr); });
        }
    });
    write_sums(sums, *a);
}
