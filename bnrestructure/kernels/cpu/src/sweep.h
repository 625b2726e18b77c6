// What the sweeps share. A sweep reads and writes each element of its tensors once, in the order in which they lie in
// memory: rows (pixels) in blocks of a few, all channels of a block before the next, so that per-channel vectors and sums
// (which stay in L1) are loaded once a block. A block's terms are summed among themselves before they join the sum: shorter
// chains of additions, faster and more accurate. Threads take contiguous shares of the rows.
#pragma once

#include <type_traits>

#include "activation.h"
#include "arguments.h"
#include "library.h"
#include "rounding.h"
#include "statistics.h"

namespace bnr::sweep {

constexpr int BLOCK_ROWS = 8;
constexpr int64_t TILE_ROWS = 128;    // summed in fp32 before the sums are flushed to double
constexpr int64_t SHIFT_ROWS = 16;    // enough for a first estimate of the mean (see statistics.h)

inline int64_t pixels(const SweepArguments& a) { return a.images * a.height * a.width; }
inline int64_t useful_threads(const SweepArguments& a) { return bnr::useful_threads(pixels(a) * a.channels, a.threads); }
inline Activation activation(const SweepArguments& a) { return {Act(a.activation), float(a.slope)}; }

// A tensor of pixels: channel c of pixel r is at data[r * ld + c]. No data: the tensor is absent.
template <class T>
struct Pixels {
    T* data;
    int64_t ld;

    template <class V>
    Pixels(V* data, int64_t ld) : data(static_cast<T*>(data)), ld(ld) {}
    explicit operator bool() const { return data != nullptr; }
    T* at(int64_t row, int64_t channel) const { return data + row * ld + channel; }
};

// Asks for what the next block will touch at this channel. A block goes down its rows channel by channel, an order in which
// the processor's own prefetchers see no streams.
template <class T>
BNR_INLINE void request(const Pixels<T>& x, int64_t row, int64_t channel) {
    __builtin_prefetch(x.data + (row + BLOCK_ROWS) * x.ld + channel, !std::is_const_v<T>);
}

// f(row, channel, lanes, n) for all channels of all rows, n rows at a time (BLOCK_ROWS, fewer at the end).
template <class F>
BNR_INLINE void for_each_block(Range rows, int64_t channels, F&& f) {
    for (int64_t r = rows.begin; r < rows.end; r += BLOCK_ROWS) {
        const int n = int(std::min<int64_t>(BLOCK_ROWS, rows.end - r));
        for_each_vector(channels, [&](int64_t c, auto lanes) { f(r, c, lanes, n); });
    }
}

// f(tile) for consecutive parts of the rows.
template <class F>
inline void for_each_tile(Range rows, F&& f) {
    for (int64_t r = rows.begin; r < rows.end; r += TILE_ROWS) f(Range{r, std::min(rows.end, r + TILE_ROWS)});
}

// f(image, rows of it) for the parts of `rows` that lie in one image, no longer than a tile.
template <class F>
inline void for_each_image_tile(const SweepArguments& a, Range rows, F&& f) {
    const int64_t positions = a.height * a.width;
    for (int64_t r = rows.begin; r < rows.end;) {
        const int64_t image = r / positions;
        const Range tile{r, std::min({rows.end, (image + 1) * positions, r + TILE_ROWS})};
        f(image, tile);
        r = tile.end;
    }
}

// A transform's vectors. Absent ones are those of the identity, which is exact: (x - 0) * 1 + 0.
struct Affine {
    const float *mean, *scale, *beta;

    Affine(Scratch& scratch, int64_t channels, const float* m, const float* s, const float* b)
        : mean(m), scale(s), beta(b) {
        if (m) return;
        float* zeros = scratch.zeros<float>(channels);
        float* ones = scratch.take<float>(channels);
        std::fill(ones, ones + channels, 1.0f);
        mean = beta = zeros;
        scale = ones;
    }

    template <class L>
    struct Vectors {
        vf mean, scale, beta;
        BNR_INLINE Vectors(const Affine& t, int64_t c, L lanes)
            : mean(load(t.mean + c, lanes)), scale(load(t.scale + c, lanes)), beta(load(t.beta + c, lanes)) {}
        BNR_INLINE vf operator()(vf x) const { return affine(x, mean, scale, beta); }
    };
    template <class L>
    BNR_INLINE Vectors<L> at(int64_t c, L lanes) const { return {*this, c, lanes}; }
};

// One Sums (or Moments) per thread, from the caller's frame of scratch.
template <class S, class... Arguments>
inline std::vector<S> per_thread(Scratch& scratch, int64_t threads, Arguments... arguments) {
    std::vector<S> all;
    all.reserve(size_t(threads));
    for (int64_t t = 0; t < threads; t++) all.emplace_back(scratch, arguments...);
    return all;
}

template <class S>
inline S& merged(std::vector<S>& all) {
    for (size_t t = 1; t < all.size(); t++) all[0].merge(all[t]);
    return all[0];
}

// z = act(affine(x)), and where the gradient at x goes: stored, or added to what is there.
struct Input {
    const SweepArguments& arguments;
    const Affine& transform;
    Activation act;
    bool accumulate;

    Input(const SweepArguments& a, const Affine& transform)
        : arguments(a), transform(transform), act(activation(a)), accumulate(a.accumulate != 0) {}
};

// The tail of every backward sweep, from g, the gradient at z: P = g * act'(u), its sums SP and SPX = sum P * (x - mean), and
// dx = scale * P. dx may be the tensor g was read from.
template <Act A, class T>
struct InputGradient {
    Pixels<const T> x;
    const Affine& transform;
    Activation act;
    Pixels<T> dx;
    bool accumulate;

    explicit InputGradient(const Input& i)
        : x(i.arguments.x, i.arguments.x_pitch), transform(i.transform), act(i.act), dx(i.arguments.dx, i.arguments.dx_pitch),
          accumulate(i.accumulate) {}

    // gradient(i) is g of row + i. With kDither dx keeps, on average, what rounding to bfloat16 would take from every pixel alike.
    template <bool kDither = false, class L, class G>
    BNR_INLINE void block(int64_t row, int64_t c, L lanes, int n, Sums& sums, G gradient) const {
        const auto t = transform.at(c, lanes);
        vf sp = zero(), spx = zero();
        for (int i = 0; i < n; i++) {
            request(x, row + i, c), request(dx, row + i, c);
            const vf v = load(x.at(row + i, c), lanes);
            vf state;
            activate<A>(t(v), act, state);
            const vf p = pull_back<A>(gradient(i), state, act);
            sp = sp + p;
            spx = fma(p, v - t.mean, spx);
            T* const target = dx.at(row + i, c);
            vf d = p * t.scale;
            if (accumulate) d = d + load(target, lanes);
            store(target, kDither ? dithered<T>(d, row + i) : d, lanes);
        }
        store(sums[0] + c, load(sums[0] + c) + sp);
        store(sums[1] + c, load(sums[1] + c) + spx);
    }
};

// The sums, in the order SP, SPX, SPR, to where the caller wants them.
inline void write_sums(std::vector<Sums>& sums, const SweepArguments& a) {
    const Sums& total = merged(sums);
    if (a.sum_p) total.write(0, a.sum_p);
    if (a.sum_px) total.write(1, a.sum_px);
    if (a.sum_pr) total.write(2, a.sum_pr);
}

}  // namespace bnr::sweep
