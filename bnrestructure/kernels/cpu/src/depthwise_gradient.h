// What the depthwise backward pass works with: its arguments made ready, rows of dY, and per-channel sums.
#pragma once

#include <vector>

#include "depthwise_rows.h"

namespace bnr::depthwise {

// Column o of dY is at `left + o` of the ring's rows. A tap's column (j + padding - kernel column * dilation) / stride
// runs past dY's edges, into zeros.
struct GradientColumns {
    int64_t left, columns;

    explicit GradientColumns(const Problem& p)
        : left(std::max<int64_t>(0, ceil_div((p.kernel_w - 1) * p.dilation_w - p.padding_w, p.stride_w))) {
        const int64_t end = std::max(p.out_width, (p.in_width - 1 + p.padding_w) / p.stride_w + 1);
        columns = (left + end) | 1;  // odd, so that a pixel's vectors fall into different sets of the cache
    }
};

struct Backward {
    const BackwardArguments& arguments;
    const Problem& p;
    Affine transform;
    const float *gates, *weight;
    const float *s, *a, *b, *y_mean;  // the backward edge; a is null when y is not needed
    GradientColumns columns;
    int64_t slots, positions;
    Blocks blocks;
    Activation act;

    Backward(Scratch& scratch, const BackwardArguments& arguments)
        : arguments(arguments),
          p(arguments.problem),
          transform(scratch, p),
          gates(padded_gates(scratch, p)),
          weight(packed_weight(scratch, p)),
          s(padded_vector(scratch, arguments.s, p.in_channels, 1.0f)),
          a(arguments.a ? padded_vector(scratch, arguments.a, p.in_channels, 0.0f) : nullptr),
          b(arguments.a ? padded_vector(scratch, arguments.b, p.in_channels, 0.0f) : nullptr),
          y_mean(arguments.a ? padded_vector(scratch, arguments.y_mean, p.in_channels, 0.0f) : nullptr),
          columns(p),
          slots((p.kernel_h - 1) * p.dilation_h / p.stride_h + 1),
          positions(p.kernel_h * p.kernel_w),
          blocks(p.in_channels,
                 RowRing::bytes_per_vector(slots, columns.columns) + positions * W * int64_t(sizeof(float))),
          act{Act(p.activation), float(p.slope)} {}
};

// The first quantities of a block's sums; the weight's gradient, position by position, comes after them.
enum Quantity { SUM_P, SUM_PX, WEIGHT_GRADIENT };

// One thread's sums over one block of channels. With a gate, SUM_P holds the gate's gradient of the current image.
struct BlockSums {
    Sums sums;
    int64_t pending = 0;  // pixels since the last flush

    BlockSums(Scratch& scratch, int64_t channels, int64_t positions)
        : sums(scratch, channels, WEIGHT_GRADIENT + positions) {}

    void add(int64_t pixels) {
        if ((pending += pixels) >= TILE_PIXELS) flush();
    }
    void flush() {
        if (pending) sums.flush();
        pending = 0;
    }
    // Moves quantity 0 to `target` and clears it.
    void take_gate(double* target) {
        for (int64_t c = 0; c < sums.channels; c++) target[c] = sums.total[c] + double(sums.tile[c]);
        std::fill(sums.total, sums.total + sums.pitch, 0.0);
        std::fill(sums.tile, sums.tile + sums.pitch, 0.0f);
    }
};

// The sums of all threads, [thread][block], into those of thread 0.
inline void merge(const Backward& f, std::vector<BlockSums>& sums) {
    for (size_t i = size_t(f.blocks.count); i < sums.size(); i++)
        sums[i % size_t(f.blocks.count)].sums.merge(sums[i].sums);
}

// dY of one row, channels from `c0` on, into `row`, a row of the ring from its column 0.
template <class T>
BNR_FLATTEN void gradient_row(const Backward& f, int64_t pixel, int64_t c0, int64_t channels, float* row) {
    const BackwardArguments& arguments = f.arguments;
    const T* p = static_cast<const T*>(arguments.dy) + pixel * arguments.dy_pitch + c0;
    const T* y = static_cast<const T*>(arguments.y) + (f.a ? pixel * arguments.y_pitch + c0 : 0);
    const int64_t vector_pitch = f.columns.columns * W, p_pitch = arguments.dy_pitch, y_pitch = arguments.y_pitch;
    const int64_t p_ahead = prefetch_distance<T>(p_pitch), y_ahead = f.a ? prefetch_distance<T>(y_pitch) : 0;
    for_each_piece(f.p.out_width, [&](int64_t begin, int64_t n) {
        for_each_vector(channels, [&](int64_t c, auto lanes) {
            float* target = row + c / W * vector_pitch + begin * W;
            const T* p_source = p + begin * p_pitch + c;
            for (int64_t i = 0; i < n; i++) prefetch(p_source + i * p_pitch + p_ahead);
            const vf s = load(f.s + c0 + c);
            if (!f.a) {
                for (int64_t i = 0; i < n; i++) store(target + i * W, s * load(p_source + i * p_pitch, lanes));
                return;
            }
            const T* y_source = y + begin * y_pitch + c;
            const vf a = load(f.a + c0 + c), b = load(f.b + c0 + c), mean = load(f.y_mean + c0 + c);
            for (int64_t i = 0; i < n; i++) {
                prefetch(y_source + i * y_pitch + y_ahead);
                const vf centred = load(y_source + i * y_pitch, lanes) - mean;
                store(target + i * W, fma(a, centred, s * load(p_source + i * p_pitch, lanes)) + b);
            }
        });
    });
}

using GradientRow = decltype(&gradient_row<float>);   // of any element type

// db = sum of dY, a sweep of its own: a bias in front of a batch norm is rare, and its rows are not those of the sweep
// above, which overlap between bands and may leave out rows that meet nothing but padding.
inline void bias_gradient(const Backward& f, GradientRow fill_row, int64_t threads) {
    Scratch scratch;
    const Problem& p = f.p;
    std::vector<BlockSums> sums;
    sums.reserve(size_t(threads * f.blocks.count));
    for (int64_t i = 0; i < threads * f.blocks.count; i++)
        sums.emplace_back(scratch, f.blocks.width(i % f.blocks.count), 0);
    parallel(threads, [&](int64_t t) {
        Scratch own;
        const RowRing ring(own, 1, f.blocks.size, f.columns.columns);
        const int64_t vector_pitch = f.columns.columns * W;
        float* row = ring.row(0);
        const Range rows = share(p.batch * p.out_height, 1, t, threads);
        for (int64_t block = 0; block < f.blocks.count; block++) {
            BlockSums& mine = sums[size_t(t * f.blocks.count + block)];
            for (int64_t i = rows.begin; i < rows.end; i++) {
                fill_row(f, i * p.out_width, f.blocks.begin(block), f.blocks.width(block), row);
                for (int64_t c = 0; c < f.blocks.width(block); c += W)
                    add_rows(row + c / W * vector_pitch, W, p.out_width, W, mine.sums[SUM_P] + c);
                mine.add(p.out_width);
            }
            mine.flush();
        }
    });
    merge(f, sums);
    for (int64_t block = 0; block < f.blocks.count; block++)
        sums[size_t(block)].sums.write(SUM_P, f.arguments.bias_gradient + f.blocks.begin(block));
}

}  // namespace bnr::depthwise
