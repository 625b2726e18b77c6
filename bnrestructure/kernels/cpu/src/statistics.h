// Per-channel statistics and sums: fp32 within a tile, double across tiles, threads merged in a fixed order.
//
// A tile's values are centred on a *shift* before they are squared: the previous tile's mean (the tile's own for a
// thread's first). The squares then lose nothing to |mean| >> deviation; and should two neighbouring tiles lie far apart,
// that distance is in the variance as well, which keeps the loss in proportion.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace bnr {

// sum[c] += sum over rows of x, for x [rows, channels] of pitch ld. `sum` has padded(channels) floats.
template <class T>
inline void add_rows(const T* x, int64_t ld, int64_t rows, int64_t channels, float* sum) {
    for_each_vector(channels, [&](int64_t c, auto lanes) {
        vf s = load(sum + c);
        for (int64_t r = 0; r < rows; r++) s = s + load(x + r * ld + c, lanes);
        store(sum + c, s);
    });
}

// sum[c] += sum of d, square[c] += sum of d*d over the rows, d = x - shift. All vectors have padded(channels) floats.
// A few rows are summed among themselves before they join the sum: eager sums in double, and a mean that is zero but for
// rounding (behind a convolution of normalised values, say) should be no further from zero than eager's.
template <class T>
inline void add_moments(const T* x, int64_t ld, int64_t rows, int64_t channels, const float* shift, float* sum,
                        float* square) {
    constexpr int64_t few = 16;
    for_each_vector(channels, [&](int64_t c, auto lanes) {
        const vf k = load(shift + c);
        vf s = load(sum + c), q = load(square + c);
        for (int64_t begin = 0; begin < rows; begin += few) {
            const int64_t end = std::min(rows, begin + few);
            vf s0 = zero(), q0 = zero(), s1 = zero(), q1 = zero();
            int64_t r = begin;
            for (; r + 2 <= end; r += 2) {
                const vf d0 = load(x + r * ld + c, lanes) - k, d1 = load(x + (r + 1) * ld + c, lanes) - k;
                s0 = s0 + d0, s1 = s1 + d1;
                q0 = fma(d0, d0, q0), q1 = fma(d1, d1, q1);
            }
            if (r < end) {
                const vf d = load(x + r * ld + c, lanes) - k;
                s0 = s0 + d;
                q0 = fma(d, d, q0);
            }
            s = s + (s0 + s1);
            q = q + (q0 + q1);
        }
        store(sum + c, s);
        store(square + c, q);
    });
}

// Running (count, mean, M2) of `channels` channels: one thread's, over the tiles it has seen.
//
//   Moments m(scratch, channels);
//   if (m.is_empty()) m.start(x, ld, rows);          // shift = the mean of the first tile
//   add_moments(x, ld, rows, channels, m.shift, m.sum, m.square);
//   m.flush(rows);                                   // folds sum and square in, clears them, moves the shift
class Moments {
  public:
    Moments(Scratch& scratch, int64_t channels)
        : channels(channels),
          count(0),
          mean(scratch.zeros<double>(channels)),
          m2(scratch.zeros<double>(channels)),
          shift(scratch.zeros<float>(padded(channels))),
          sum(scratch.zeros<float>(padded(channels))),
          square(scratch.zeros<float>(padded(channels))) {}

    bool is_empty() const { return count == 0; }

    template <class T>
    void start(const T* x, int64_t ld, int64_t rows) {
        add_rows(x, ld, rows, channels, sum);
        for (int64_t c = 0; c < channels; c++) shift[c] = sum[c] / float(rows), sum[c] = 0;
    }

    // Chan's formula: merges the tile of n rows whose centred sums are in `sum` and `square`.
    void flush(int64_t n) {
        const double total = double(count + n), weight = double(n) / total, cross = double(count) * weight;
        for (int64_t c = 0; c < channels; c++) {
            const double d = double(sum[c]) / double(n);
            const double tile_mean = double(shift[c]) + d, delta = tile_mean - mean[c];
            const double within = double(square[c]) - d * double(sum[c]);
            m2[c] += (within > 0 || within != within ? within : 0.0) + delta * delta * cross;
            mean[c] += delta * weight;
            shift[c] = float(tile_mean);
            sum[c] = square[c] = 0;
        }
        count += n;
    }

    // Merges another thread's.
    void merge(const Moments& o) {
        if (o.count == 0) return;
        const double total = double(count + o.count), weight = double(o.count) / total, cross = double(count) * weight;
        for (int64_t c = 0; c < channels; c++) {
            const double delta = o.mean[c] - mean[c];
            m2[c] += o.m2[c] + delta * delta * cross;
            mean[c] += delta * weight;
        }
        count += o.count;
    }

    // Mean and biased variance, [channels] each.
    void write(float* out_mean, float* out_var) const {
        for (int64_t c = 0; c < channels; c++) {
            out_mean[c] = float(mean[c]);
            out_var[c] = float(m2[c] / double(count));
        }
    }

    int64_t channels;
    int64_t count;
    double *mean, *m2;
    float *shift, *sum, *square;
};

// Per-channel sums of one or several quantities: fp32 in a tile, flushed to double. `tile` has padded(n) floats per
// quantity; quantities lie padded(n) apart.
class Sums {
  public:
    Sums(Scratch& scratch, int64_t channels, int64_t quantities)
        : channels(channels),
          pitch(padded(channels)),
          quantities(quantities),
          tile(scratch.zeros<float>(quantities * padded(channels))),
          total(scratch.zeros<double>(quantities * padded(channels))) {}

    float* operator[](int64_t quantity) { return tile + quantity * pitch; }

    void flush() {
        for (int64_t i = 0; i < quantities * pitch; i++) total[i] += double(tile[i]), tile[i] = 0;
    }

    void merge(const Sums& o) {
        for (int64_t i = 0; i < quantities * pitch; i++) total[i] += o.total[i];
    }

    void write(int64_t quantity, float* out) const {
        for (int64_t c = 0; c < channels; c++) out[c] = float(total[quantity * pitch + c]);
    }

    int64_t channels, pitch, quantities;
    float* tile;
    double* total;
};

}  // namespace bnr
