// The fused depthwise convolution, forward: prologue (normalisation, activation, gate), convolution and the statistics
// of its output in one sweep.
#include <vector>

#include "depthwise_rows.h"

namespace bnr::depthwise {
namespace {

// The ring's columns: padded column j is at (j % stride) * phase + j / stride, so that the columns that one kernel
// column reads for successive outputs are neighbours.
struct InputColumns {
    int64_t stride, phase, columns;
    int64_t* position;  // of each column of x; -1 where no output reads it

    InputColumns(Scratch& scratch, const Problem& p) : stride(p.stride_w) {
        const int64_t used = (p.out_width - 1) * stride + (p.kernel_w - 1) * p.dilation_w + 1;
        phase = ceil_div(used, stride);
        columns = (phase * stride) | 1;  // odd, so that a pixel's vectors fall into different sets of the cache
        position = scratch.take<int64_t>(p.in_width);
        for (int64_t j = 0; j < p.in_width; j++) position[j] = j + p.padding_w < used ? at(j + p.padding_w) : -1;
    }
    int64_t at(int64_t j) const { return j % stride * phase + j / stride; }
};

struct Forward {
    const ForwardArguments& arguments;
    const Problem& p;
    Affine transform;
    const float *gates, *weight, *bias;
    InputColumns columns;
    int64_t slots;
    Blocks blocks;
    Activation act;

    Forward(Scratch& scratch, const ForwardArguments& arguments)
        : arguments(arguments),
          p(arguments.problem),
          transform(scratch, p),
          gates(padded_gates(scratch, p)),
          weight(packed_weight(scratch, p)),
          bias(padded_vector(scratch, arguments.bias, p.in_channels, 0.0f)),
          columns(scratch, p),
          slots((p.kernel_h - 1) * p.dilation_h + 1),
          blocks(p.in_channels, RowRing::bytes_per_vector(slots, columns.columns)),
          act{Act(p.activation), float(p.slope)} {}
};

// The row of x that begins with `pixel`, channels from `c0` on: transformed into `row`.
template <Act A, class T>
BNR_FLATTEN void transform_row(const Forward& f, int64_t pixel, int64_t c0, int64_t channels, const float* gate,
                               float* row) {
    const int64_t vector_pitch = f.columns.columns * W, pitch = f.p.x_pitch, ahead = prefetch_distance<T>(pitch);
    const T* x = static_cast<const T*>(f.p.x) + pixel * pitch + c0;
    const Activation act = f.act;
    for_each_piece(f.p.in_width, [&](int64_t begin, int64_t n) {
        const int64_t* position = f.columns.position + begin;
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            const vf factor = gate ? load(gate + c) : set1(1.0f);
            const auto transform = f.transform.at(c0 + c);
            float* target = row + c / W * vector_pitch;
            for (int64_t i = 0; i < n; i++) {
                const T* source = x + (begin + i) * pitch + c;
                prefetch(source + ahead);
                const vf z = activate<A>(transform(load(source, lanes)), act) * factor;
                if (position[i] >= 0) store(target + position[i] * W, z);
            }
        });
    });
}

// The row of y that begins with `pixel`, and with `moments` the sums of its statistics.
template <class T>
BNR_FLATTEN void convolve_row(const Forward& f, const Tap* taps, int64_t tap_count, int64_t c0, int64_t channels,
                              int64_t pixel, Moments* moments) {
    const int64_t vector_pitch = f.columns.columns * W, weight_pitch = padded(f.p.in_channels);
    const int64_t pitch = f.arguments.y_pitch, ahead = prefetch_distance<T>(pitch);
    T* y = static_cast<T*>(f.arguments.y) + pixel * pitch + c0;
    for_each_piece(f.p.out_width, [&](int64_t begin, int64_t columns) {
        with_columns(columns, [&](auto n) {
            for_each_vector(channels, [&](int64_t c, auto lanes) {
                vf sum[decltype(n)::value];
                for (int i = 0; i < n; i++) {
                    sum[i] = load(f.bias + c0 + c);
                    prefetch_write(y + (begin + i) * pitch + c + ahead);
                }
                for (int64_t k = 0; k < tap_count; k++) {
                    const vf w = load(f.weight + taps[k].weight * weight_pitch + c0 + c);
                    const float* z = taps[k].row + c / W * vector_pitch + begin * W;
                    for (int i = 0; i < n; i++) sum[i] = fma(w, load(z + i * W), sum[i]);
                }
                for (int i = 0; i < n; i++) store(y + (begin + i) * pitch + c, sum[i], lanes);
                if (!moments) return;
                const vf shift = load(moments->shift + c);
                vf s = zero(), q = zero();
                for (int i = 0; i < n; i++) {
                    const vf d = stored<T>(sum[i]) - shift;
                    s = s + d;
                    q = fma(d, d, q);
                }
                store(moments->sum + c, load(moments->sum + c) + s);
                store(moments->square + c, load(moments->square + c) + q);
            });
        });
    });
}

// A thread's first row, once it is in memory: its mean becomes the shift.
template <class T>
void start_moments(const Forward& f, int64_t pixel, int64_t c0, int64_t channels, Moments& moments) {
    const int64_t pitch = f.arguments.y_pitch;
    const T* y = static_cast<const T*>(f.arguments.y) + pixel * pitch + c0;
    moments.start(y, pitch, f.p.out_width);
    add_moments(y, pitch, f.p.out_width, channels, moments.shift, moments.sum, moments.square);
}

// What depends on the activation and the element types; all the rest is compiled once.
struct RowKernels {
    decltype(&transform_row<Act::any, float>) transform;
    decltype(&convolve_row<float>) convolve;
    decltype(&start_moments<float>) start;
};

// One thread's statistics of one block of channels.
struct Statistics {
    Moments moments;
    int64_t pending = 0;  // pixels since the last flush

    Statistics(Scratch& scratch, int64_t channels) : moments(scratch, channels) {}

    void flush() {
        if (pending) moments.flush(pending);
        pending = 0;
    }
};

// A band of rows of one image and one block of channels.
void convolve_band(const Forward& f, const RowKernels& kernels, const RowRing& ring, Tap* taps, int64_t image, Range rows,
                   int64_t block, Statistics* statistics) {
    const Problem& p = f.p;
    const int64_t c0 = f.blocks.begin(block), channels = f.blocks.width(block);
    const float* gate = f.gates ? f.gates + image * padded(p.in_channels) + c0 : nullptr;
    int64_t ready = 0;  // the first row of x that has not been transformed yet
    for (int64_t i = rows.begin; i < rows.end; i++) {
        const int64_t first = i * p.stride_h - p.padding_h, last = first + (p.kernel_h - 1) * p.dilation_h;
        for (ready = std::max(ready, first); ready <= std::min(last, p.in_height - 1); ready++)
            kernels.transform(f, (image * p.in_height + ready) * p.in_width, c0, channels, gate, ring.row(ready));
        int64_t tap_count = 0;
        for (int64_t ky = 0; ky < p.kernel_h; ky++) {
            const int64_t source = first + ky * p.dilation_h;
            if (source < 0 || source >= p.in_height) continue;
            for (int64_t kx = 0; kx < p.kernel_w; kx++)
                taps[tap_count++] = {ring.row(source) + f.columns.at(kx * p.dilation_w) * W, ky * p.kernel_w + kx};
        }
        const int64_t pixel = (image * p.out_height + i) * p.out_width;
        if (statistics && statistics->moments.is_empty() && statistics->pending == 0) {
            kernels.convolve(f, taps, tap_count, c0, channels, pixel, nullptr);
            kernels.start(f, pixel, c0, channels, statistics->moments);
        } else {
            kernels.convolve(f, taps, tap_count, c0, channels, pixel, statistics ? &statistics->moments : nullptr);
        }
        if (statistics && (statistics->pending += p.out_width) >= TILE_PIXELS) statistics->flush();
    }
}

void convolve(const Forward& f, const RowKernels& kernels, Scratch& scratch) {
    const Problem& p = f.p;
    const int64_t work = p.batch * p.in_channels * p.in_height * p.in_width;
    const int64_t threads = useful_threads(work, p.threads);
    const Bands bands(p.batch, p.out_height, threads);
    std::vector<Statistics> statistics;  // thread by thread, block by block
    if (f.arguments.y_mean) {
        statistics.reserve(size_t(threads * f.blocks.count));
        for (int64_t i = 0; i < threads * f.blocks.count; i++)
            statistics.emplace_back(scratch, f.blocks.width(i % f.blocks.count));
    }
    parallel(threads, [&](int64_t t) {
        Scratch own;
        const RowRing ring(own, f.slots, f.blocks.size, f.columns.columns);
        Tap* taps = own.take<Tap>(p.kernel_h * p.kernel_w);
        Statistics* mine = statistics.empty() ? nullptr : &statistics[size_t(t * f.blocks.count)];
        const Range work = share(bands.count(), 1, t, threads);
        for (int64_t band = work.begin; band < work.end; band++)
            for (int64_t block = 0; block < f.blocks.count; block++)
                convolve_band(f, kernels, ring, taps, bands.image(band), bands.range(band), block,
                              mine ? mine + block : nullptr);
        if (mine)
            for (int64_t block = 0; block < f.blocks.count; block++) mine[block].flush();
    });
    for (int64_t block = 0; block < f.blocks.count && !statistics.empty(); block++) {
        Moments& total = statistics[size_t(block)].moments;
        for (int64_t t = 1; t < threads; t++) total.merge(statistics[size_t(t * f.blocks.count + block)].moments);
        total.write(f.arguments.y_mean + f.blocks.begin(block), f.arguments.y_var + f.blocks.begin(block));
    }
}

}  // namespace
}  // namespace bnr::depthwise

using namespace bnr;

BNR_EXPORT void bnr_depthwise_forward(const ForwardArguments* arguments) {
    Scratch scratch;
    const depthwise::Forward f(scratch, *arguments);
    depthwise::RowKernels kernels;
    kernels.transform = kernel_for(f.p.x_element, f.act.kind, [](auto* type, auto act) {
        return depthwise::transform_row<act.value, std::remove_pointer_t<decltype(type)>>;
    });
    with_element(f.p.y_element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        kernels.convolve = depthwise::convolve_row<T>;
        kernels.start = depthwise::start_moments<T>;
    });
    depthwise::convolve(f, kernels, scratch);
}
