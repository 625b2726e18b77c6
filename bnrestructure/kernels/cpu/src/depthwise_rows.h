// What the depthwise convolution's two directions share: how the work is cut up, and rows of scratch.
//
// A depthwise convolution does so little arithmetic that memory sets its speed, so each activation is read from memory
// once and written once. An image is walked row by row. The operand that the taps read (z in forward, dY in backward)
// is computed once a value, as fp32, into a ring of the last few rows, which stays in cache:
//
//     row of scratch = [vector of W channels][column, zero padded][W]
//
// For a tap, the operands of neighbouring outputs then lie in neighbouring vectors, whatever the stride and dilation
// are: strides are taken out when a row is laid down (forward splits its columns by their remainder modulo the stride)
// or when it is walked (backward does so with the columns of dx). So any kernel size, stride and dilation comes down to
// a list of taps and one inner loop.
#pragma once

#include <type_traits>

#include "activation.h"
#include "arguments.h"
#include "library.h"
#include "statistics.h"

namespace bnr::depthwise {

constexpr int COLUMNS = 8;               // outputs of a row computed together, at most: one register each
constexpr int64_t TILE_PIXELS = 512;     // summed in fp32 before the sums are flushed to double
constexpr int64_t RING_BYTES = 256 << 10;  // of scratch that should stay in L2 next to the rows that stream by

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How far ahead of their use rows are prefetched, in whole pixels: the few short runs of memory that a piece of a row
// consists of are too many streams for the hardware to follow.
constexpr int64_t PREFETCH_BYTES = 8 << 10;
template <class T>
inline int64_t prefetch_distance(int64_t pitch) {
    return ceil_div(PREFETCH_BYTES, pitch * int64_t(sizeof(T))) * pitch;
}

// One position of the kernel. `row` points into a row of the ring, at vector 0 and output column 0; `weight` is the
// position's number, kernel row by kernel row.
struct Tap {
    const float* row;
    int64_t weight;
};

// Channels in blocks of whole vectors, as equal as they come. Each block of an image is walked on its own.
struct Blocks {
    int64_t channels, size, count;

    Blocks(int64_t channels, int64_t bytes_per_vector) : channels(channels) {
        // Pixels are read in pieces of a block's channels, and short pieces waste memory bandwidth: 256 bytes or more.
        const int64_t least = 64 / W, vectors = ceil_div(channels, W);
        const int64_t most = std::max(least, RING_BYTES / bytes_per_vector);
        count = ceil_div(vectors, most);
        size = ceil_div(vectors, count) * W;
        count = ceil_div(channels, size);
    }
    int64_t begin(int64_t block) const { return block * size; }
    int64_t width(int64_t block) const { return std::min(size, channels - block * size); }
};

// The work: the rows of every image, in bands. Images are cut into bands only where there are too few of them for the
// threads, since the first rows of a band need rows of the band before it.
struct Bands {
    int64_t images, rows, per_image;

    Bands(int64_t images, int64_t rows, int64_t threads) : images(images), rows(rows), per_image(1) {
        if (images % threads != 0 && images < 8 * threads) per_image = std::min(rows, ceil_div(4 * threads, images));
    }
    int64_t count() const { return images * per_image; }
    int64_t image(int64_t band) const { return band / per_image; }
    Range range(int64_t band) const { return share(rows, 1, band % per_image, per_image); }
};

// A ring of rows. Its columns are zero until they are written, and a row's padding never is.
class RowRing {
  public:
    RowRing(Scratch& scratch, int64_t slots, int64_t channels, int64_t columns)
        : columns_(columns),
          slots_(slots),
          pitch_(padded(channels) * columns),
          data_(scratch.zeros<float>(slots * pitch_)) {}

    float* row(int64_t i) const { return data_ + i % slots_ * pitch_; }
    // Floats from one vector of channels to the next.
    int64_t vector_pitch() const { return columns_ * W; }
    static int64_t bytes_per_vector(int64_t slots, int64_t columns) {
        return slots * columns * W * int64_t(sizeof(float));
    }

  private:
    int64_t columns_, slots_, pitch_;
    float* data_;
};

// A per-channel vector padded to whole vectors; `absent` where there is none, 0 beyond the last channel.
inline float* padded_vector(Scratch& scratch, const float* v, int64_t channels, float absent) {
    float* p = scratch.zeros<float>(padded(channels));
    for (int64_t c = 0; c < channels; c++) p[c] = v ? v[c] : absent;
    return p;
}

// A prologue's per-channel vectors. Absent ones are the identity's, which is exact: (x - 0) * 1 + 0.
struct Affine {
    const float *mean, *scale, *beta;

    Affine(Scratch& scratch, const Problem& p)
        : mean(padded_vector(scratch, p.mean, p.in_channels, 0.0f)),
          scale(padded_vector(scratch, p.scale, p.in_channels, 1.0f)),
          beta(padded_vector(scratch, p.beta, p.in_channels, 0.0f)) {}

    // The transform of one vector of channels, in registers.
    struct Vectors {
        vf mean, scale, beta;
        BNR_INLINE vf operator()(vf x) const { return affine(x, mean, scale, beta); }
    };
    BNR_INLINE Vectors at(int64_t c) const { return {load(mean + c), load(scale + c), load(beta + c)}; }
};

// The gates of all images, [N, padded(C)], or null without one.
inline const float* padded_gates(Scratch& scratch, const Problem& p) {
    if (!p.gate) return nullptr;
    float* gates = scratch.zeros<float>(p.batch * padded(p.in_channels));
    for (int64_t n = 0; n < p.batch; n++)
        std::copy(p.gate + n * p.in_channels, p.gate + (n + 1) * p.in_channels, gates + n * padded(p.in_channels));
    return gates;
}

// The weight as fp32 [kernel position][padded(C)].
inline const float* packed_weight(Scratch& scratch, const Problem& p) {
    float* packed = scratch.zeros<float>(p.kernel_h * p.kernel_w * padded(p.in_channels));
    with_element(p.weight_element, [&](auto* type) {
        const auto* weight = static_cast<decltype(type)>(const_cast<void*>(p.weight));
        for (int64_t ky = 0; ky < p.kernel_h; ky++)
            for (int64_t kx = 0; kx < p.kernel_w; kx++) {
                float* target = packed + (ky * p.kernel_w + kx) * padded(p.in_channels);
                const auto* source = weight + ky * p.weight_strides[2] + kx * p.weight_strides[3];
                for (int64_t c = 0; c < p.in_channels; c++) target[c] = to_float(source[c * p.weight_strides[0]]);
            }
    });
    return packed;
}

// f(column, n) for the columns [0, columns) in pieces of at most COLUMNS, as equal as they come.
template <class F>
BNR_INLINE void for_each_piece(int64_t columns, F&& f) {
    const int64_t pieces = ceil_div(columns, COLUMNS);
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t begin = columns * i / pieces;
        f(begin, columns * (i + 1) / pieces - begin);
    }
}

// f(n) with n, from 0 to COLUMNS, as an integral_constant: arrays of n vectors then stay in registers.
template <class F>
BNR_INLINE void with_columns(int64_t n, F&& f) {
    switch (n) {
        case 0: return;
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, COLUMNS>{});
    }
}

}  // namespace bnr::depthwise
