// The fused depthwise convolution, backward: dY from the backward edge, the gradients of the input and of the weight,
// the activation's mask and the sums that the normalisation's own gradient needs, in one sweep over the rows of x.
#include <vector>

#include "depthwise_gradient.h"
#include "depthwise_taps.h"

namespace bnr::depthwise {
namespace {

// The taps of one row of x, phase by phase of its columns (their remainder modulo the stride).
class RowTaps {
  public:
    RowTaps(Scratch& scratch, const Problem& p)
        : taps_(scratch.take<Tap>(p.kernel_h * p.kernel_w)), begin_(scratch.take<int64_t>(p.stride_w + 1)) {}

    void build(const Backward& f, const RowRing& ring, int64_t row) {
        const Problem& p = f.p;
        int64_t count = 0;
        for (int64_t phase = 0; phase < p.stride_w; phase++) {
            begin_[phase] = count;
            for (int64_t ky = 0; ky < p.kernel_h; ky++) {
                const int64_t y = row + p.padding_h - ky * p.dilation_h;
                if (y < 0 || y % p.stride_h || y / p.stride_h >= p.out_height) continue;
                for (int64_t kx = 0; kx < p.kernel_w; kx++) {
                    const int64_t x = phase + p.padding_w - kx * p.dilation_w;
                    if (x % p.stride_w) continue;
                    const int64_t column = f.columns.left + x / p.stride_w;
                    taps_[count++] = {ring.row(y / p.stride_h) + column * W, ky * p.kernel_w + kx};
                }
            }
        }
        begin_[p.stride_w] = count;
    }
    const Tap* of(int64_t phase) const { return taps_ + begin_[phase]; }
    int64_t count(int64_t phase) const { return begin_[phase + 1] - begin_[phase]; }

  private:
    Tap* taps_;
    int64_t* begin_;
};

// The positions of x that are worked on together, for one vector of channels.
template <Act A, class T, class L>
struct Piece {
    const T* x;
    T* dx;
    int64_t x_step, dx_step;  // from one position to the next
    int64_t x_ahead, dx_ahead;  // prefetch distances
    int64_t n;
    L lanes;
    Affine::Vectors transform;

    // z, gated, and in `kept` what the epilogue needs: with a gate the value before it, else the derivative's state.
    BNR_INLINE void prologue(Activation act, const float* gate, float* z, float* kept) const {
        for (int64_t i = 0; i < n; i++) {
            vf state;
            prefetch(x + i * x_step + x_ahead);
            const vf value = activate<A>(transform(load(x + i * x_step, lanes)), act, state);
            store(z + i * W, gate ? value * load(gate) : value);
            store(kept + i * W, gate ? value : state);
        }
    }

    // From g, the gradient at z, to dx and the sums.
    BNR_INLINE void epilogue(Activation act, const float* gate, const float* g, const float* kept, bool accumulate,
                             float* sum_p, float* sum_px) const {
        vf sp = zero(), spx = zero();
        for (int64_t i = 0; i < n; i++) {
            const vf at_z = load(g + i * W), k = load(kept + i * W);
            prefetch_write(dx + i * dx_step + dx_ahead);
            vf d;
            if (gate) {
                sp = fma(at_z, k, sp);
                d = at_z * load(gate);
            } else {
                const vf p = pull_back<A>(at_z, k, act);
                sp = sp + p;
                spx = fma(p, load(x + i * x_step, lanes) - transform.mean, spx);
                d = p * transform.scale;
            }
            if (accumulate) d = d + load(dx + i * dx_step, lanes);
            store(dx + i * dx_step, d, lanes);
        }
        store(sum_p, load(sum_p) + sp);
        store(sum_px, load(sum_px) + spx);
    }
};

// One row of x, channels from `c0` on: dx, the sums and the weight's gradient.
template <Act A, class T>
BNR_FLATTEN void input_row(const Backward& f, const RowTaps& taps, int64_t pixel, int64_t c0, int64_t channels,
                           const float* gate, Sums& sums) {
    const Problem& p = f.p;
    const BackwardArguments& arguments = f.arguments;
    const T* x = static_cast<const T*>(p.x) + pixel * p.x_pitch + c0;
    T* dx = arguments.dx ? static_cast<T*>(arguments.dx) + pixel * arguments.dx_pitch + c0 : nullptr;
    const int64_t weight_pitch = padded(p.in_channels), vector_pitch = f.columns.columns * W;
    const int64_t x_ahead = prefetch_distance<T>(p.x_pitch);
    const int64_t dx_ahead = dx ? prefetch_distance<T>(arguments.dx_pitch) : 0;
    alignas(64) float z[COLUMNS * W], kept[COLUMNS * W], g[COLUMNS * W];
    for_each_piece(ceil_div(p.in_width, p.stride_w), [&](int64_t begin, int64_t longest) {
        for (int64_t phase = 0; phase < p.stride_w; phase++) {
            // The last phases may be one column short.
            const int64_t n = std::min(longest, ceil_div(p.in_width - phase, p.stride_w) - begin);
            if (n <= 0) continue;
            const TapKernel kernel = tap_kernel(n, dx != nullptr, arguments.weight_gradient != nullptr);
            const int64_t column = begin * p.stride_w + phase;
            for_each_vector(channels, [&](int64_t c, auto lanes) {
                const Piece<A, T, decltype(lanes)> piece{x + column * p.x_pitch + c,
                                                         dx ? dx + column * arguments.dx_pitch + c : nullptr,
                                                         p.stride_w * p.x_pitch,
                                                         p.stride_w * arguments.dx_pitch,
                                                         x_ahead,
                                                         dx_ahead,
                                                         n,
                                                         lanes,
                                                         f.transform.at(c0 + c)};
                const float* own_gate = gate ? gate + c : nullptr;
                piece.prologue(f.act, own_gate, z, kept);
                kernel({taps.of(phase), taps.count(phase), c / W * vector_pitch + begin * W, f.weight + c0 + c,
                        weight_pitch, z, g, sums[WEIGHT_GRADIENT] + c, sums.pitch});
                if (dx)
                    piece.epilogue(f.act, own_gate, g, kept, arguments.accumulate != 0, sums[SUM_P] + c,
                                   sums[SUM_PX] + c);
            });
        }
    });
}

// What depends on the activation and the element types; all the rest is compiled once.
struct RowKernels {
    GradientRow gradient;
    decltype(&input_row<Act::any, float>) input;
};

// A band of rows of x of one image, and one block of channels.
void backward_band(const Backward& f, const RowKernels& kernels, const RowRing& ring, RowTaps& taps, int64_t image,
                   Range rows, int64_t block, BlockSums& sums) {
    const Problem& p = f.p;
    const int64_t c0 = f.blocks.begin(block), channels = f.blocks.width(block);
    const float* gate = f.gates ? f.gates + image * padded(p.in_channels) + c0 : nullptr;
    int64_t ready = 0;  // the first row of dY that has not been computed yet
    for (int64_t i = rows.begin; i < rows.end; i++) {
        const int64_t reach = i + p.padding_h;
        const int64_t first = ceil_div(std::max<int64_t>(0, reach - (p.kernel_h - 1) * p.dilation_h), p.stride_h);
        const int64_t last = std::min(p.out_height - 1, reach / p.stride_h);
        for (ready = std::max(ready, first); ready <= last; ready++)
            kernels.gradient(f, (image * p.out_height + ready) * p.out_width, c0, channels,
                             ring.row(ready) + f.columns.left * W);
        taps.build(f, ring, i);
        kernels.input(f, taps, (image * p.in_height + i) * p.in_width, c0, channels, gate, sums.sums);
        sums.add(p.in_width);
    }
}

template <class T>
void write_weight_gradient(const Backward& f, const Sums& sums, int64_t c0, T* target) {
    const int64_t* strides = f.arguments.weight_gradient_strides;
    for (int64_t k = 0; k < f.positions; k++) {
        T* position = target + k / f.p.kernel_w * strides[2] + k % f.p.kernel_w * strides[3];
        const double* source = sums.total + (WEIGHT_GRADIENT + k) * sums.pitch;
        for (int64_t c = 0; c < sums.channels; c++) position[(c0 + c) * strides[0]] = from_float<T>(float(source[c]));
    }
}

void backward(const Backward& f, const RowKernels& kernels, int64_t threads) {
    Scratch scratch;
    const Problem& p = f.p;
    const BackwardArguments& arguments = f.arguments;
    const Bands bands(p.batch, p.in_height, threads);
    std::vector<BlockSums> sums;
    sums.reserve(size_t(threads * f.blocks.count));
    for (int64_t i = 0; i < threads * f.blocks.count; i++)
        sums.emplace_back(scratch, f.blocks.width(i % f.blocks.count), f.positions);
    double* gate_bands = f.gates ? scratch.take<double>(bands.count() * p.in_channels) : nullptr;
    parallel(threads, [&](int64_t t) {
        Scratch own;
        const RowRing ring(own, f.slots, f.blocks.size, f.columns.columns);
        RowTaps taps(own, p);
        BlockSums* mine = &sums[size_t(t * f.blocks.count)];
        const Range work = share(bands.count(), 1, t, threads);
        for (int64_t band = work.begin; band < work.end; band++)
            for (int64_t block = 0; block < f.blocks.count; block++) {
                backward_band(f, kernels, ring, taps, bands.image(band), bands.range(band), block, mine[block]);
                if (gate_bands) mine[block].take_gate(gate_bands + band * p.in_channels + f.blocks.begin(block));
            }
        for (int64_t block = 0; block < f.blocks.count; block++) mine[block].flush();
    });
    merge(f, sums);
    for (int64_t block = 0; block < f.blocks.count; block++) {
        const Sums& total = sums[size_t(block)].sums;
        const int64_t c0 = f.blocks.begin(block);
        if (arguments.sum_p) {
            total.write(SUM_P, arguments.sum_p + c0);
            total.write(SUM_PX, arguments.sum_px + c0);
        }
        if (arguments.weight_gradient)
            with_element(p.weight_element, [&](auto* type) {
                write_weight_gradient(f, total, c0, static_cast<decltype(type)>(arguments.weight_gradient));
            });
    }
    for (int64_t i = 0; gate_bands && arguments.gate_gradient && i < p.batch * p.in_channels; i++) {
        const double* parts = gate_bands + i / p.in_channels * bands.per_image * p.in_channels + i % p.in_channels;
        double total = 0;
        for (int64_t band = 0; band < bands.per_image; band++) total += parts[band * p.in_channels];
        arguments.gate_gradient[i] = float(total);
    }
}

}  // namespace
}  // namespace bnr::depthwise

using namespace bnr;

BNR_EXPORT void bnr_depthwise_backward(const BackwardArguments* arguments) {
    Scratch scratch;
    const depthwise::Backward f(scratch, *arguments);
    const int64_t work = f.p.batch * f.p.in_channels * f.p.in_height * f.p.in_width;
    const int64_t threads = useful_threads(work, f.p.threads);
    depthwise::RowKernels kernels;
    kernels.input = kernel_for(f.p.x_element, f.act.kind, [](auto* type, auto act) {
        return depthwise::input_row<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    with_element(f.p.y_element, [&](auto* type) {
        kernels.gradient = depthwise::gradient_row<std::remove_pointer_t<decltype(type)>>;
    });
    if (arguments->dx || arguments->weight_gradient) depthwise::backward(f, kernels, threads);
    if (arguments->bias_gradient) depthwise::bias_gradient(f, kernels.gradient, threads);
}
