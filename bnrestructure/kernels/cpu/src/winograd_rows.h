// What the Winograd convolutions share: rows of tiles, the staged rows that they read, and the convolution itself.
#pragma once

#include "gemm.h"
#include "winograd.h"

namespace bnr::winograd {

// One side of a convolution: pixels of an image and their channels.
struct Plane {
    int64_t height, width, channels;
};

// A batch of images cut into rows of 2x2 tiles; the rows of all images count through.
struct TileRows {
    TileRows(const Plane& out, int64_t batch)
        : tiles(conv::ceil_div(out.width, 2)), per_image(conv::ceil_div(out.height, 2)), count(batch * per_image) {}

    int64_t tiles, per_image, count;
};

// The four rows of the (zero-padded, transformed) input that a row of tiles reads. Those that the row of tiles before it read,
// too, are kept.
class StagedRows {
  public:
    StagedRows(Scratch& scratch, const Plane& in, int64_t padding_h, int64_t padding_w, int64_t tiles, int64_t channels)
        : height_(in.height), width_(in.width), padding_h_(padding_h), padding_w_(padding_w),
          pitch_(conv::scratch_pitch(channels)), row_size_((2 * tiles + 2) * pitch_), data_(scratch.zeros<float>(4 * row_size_)) {}

    int64_t pitch() const { return pitch_; }

    void forget() { image_ = -1; }

    // fill(row, to) writes a row of the image.
    template <class Fill>
    void move_to(int64_t image, int64_t tile_row, Fill&& fill) {
        const bool follows = image == image_ && tile_row == tile_row_ + 1;
        for (int64_t q = 0; q < 4; q++) {
            float* slot = data_ + (2 * tile_row + q) % 4 * row_size_;
            rows_[q] = slot;
            if (follows && q < 2) continue;
            float* to = slot + padding_w_ * pitch_;
            const int64_t row = 2 * tile_row + q - padding_h_;
            if (row >= 0 && row < height_) fill(row, to);
            else std::memset(static_cast<void*>(to), 0, size_t(width_ * pitch_) * sizeof(float));
        }
        image_ = image, tile_row_ = tile_row;
    }

    const float* const* rows() const { return rows_; }

  private:
    int64_t height_, width_, padding_h_, padding_w_, pitch_, row_size_;
    float* data_;
    const float* rows_[4] = {};
    int64_t image_ = -1, tile_row_ = -1;
};

// Asks for the pixels of a [batch, *plane] tensor that the next rows of tiles read or write, as far as they are there.
inline void request(const void* data, int64_t pitch, int64_t batch, const Plane& plane, const TileRows& rows, Range next,
                    gemm::Prefetch& prefetch) {
    const int64_t pixel = (next.begin / rows.per_image * plane.height + 2 * (next.begin % rows.per_image)) * plane.width;
    const int64_t most = batch * plane.height * plane.width - pixel;
    prefetch.add(static_cast<const float*>(data) + pixel * pitch, pitch * 4, std::min(most, next.size() * 2 * plane.width),
                 plane.channels * 4);
}

// How many rows of tiles go through the products together, where each takes so many floats of scratch.
inline int64_t rows_together(const TileRows& rows, int64_t floats_each, int64_t least_pixels, int64_t budget) {
    const int64_t fit = budget / (4 * floats_each), least = conv::ceil_div(least_pixels, rows.tiles);
    return std::max<int64_t>(1, std::min(rows.count, std::max(least, fit)));
}

// One thread's rows of tiles of a convolution, in groups, of `in` with the transformed weight.
class Convolution {
  public:
    Convolution(Scratch& scratch, const Plane& in, const Plane& out, const TileRows& rows, int64_t padding_h, int64_t padding_w,
                const conv::PackedWeight& weight, int64_t groups)
        : in_(in), out_(out), rows_(rows), weight_(weight), groups_(groups), together_(chunk(in, out, rows)),
          staged_(scratch, in, padding_h, padding_w, rows.tiles, in.channels),
          input_(scratch, together_ * rows.tiles, in.channels), product_(scratch, together_ * rows.tiles, out.channels),
          pitch_(conv::scratch_pitch(out.channels)), made_(scratch.take<float>(4 * rows.tiles * pitch_)) {}

    // fill(image, row, to, pitch) stages a row of the input; finish(image, row, from, pitch) takes a row of the output;
    // flush(pixels) comes after so many pixels of output, some rows of tiles; request(rows, prefetch) is told of the next ones.
    template <class Fill, class Finish, class Flush, class Request>
    void run(Range mine, Fill&& fill, Finish&& finish, Flush&& flush, Request&& request) {
        float* const made[2] = {made_, made_ + 2 * rows_.tiles * pitch_};
        for (int64_t begin = mine.begin; begin < mine.end; begin += together_) {
            const int64_t end = std::min(mine.end, begin + together_);
            for (int64_t i = begin; i < end; i++) {
                const int64_t image = i / rows_.per_image;
                staged_.move_to(image, i % rows_.per_image, [&](int64_t row, float* to) { fill(image, row, to, staged_.pitch()); });
                transform_input(staged_.rows(), staged_.pitch(), rows_.tiles, in_.channels, input_, (i - begin) * rows_.tiles);
            }
            prefetch_.clear();
            if (end < mine.end) request(Range{end, std::min(mine.end, end + together_)}, prefetch_);
            multiply((end - begin) * rows_.tiles);
            int64_t pixels = 0;
            for (int64_t i = begin; i < end; i++) {
                const int64_t image = i / rows_.per_image, row = 2 * (i % rows_.per_image);
                transform_output(product_, (i - begin) * rows_.tiles, rows_.tiles, out_.channels, made, pitch_);
                for (int64_t q = 0; q < 2 && row + q < out_.height; q++, pixels += out_.width) finish(image, row + q, made[q], pitch_);
            }
            flush(pixels);
        }
    }

  private:
    static int64_t chunk(const Plane& in, const Plane& out, const TileRows& rows) {
        const int64_t floats = kComponents * rows.tiles * (conv::scratch_pitch(in.channels) + conv::scratch_pitch(out.channels));
        // Weights far beyond the cache are read again for every chunk; measured, with those of 512 x 512 channels and more.
        const bool reads_far = kComponents * in.channels * out.channels * 4 > 8 * conv::cache_size();
        return rows_together(rows, floats, reads_far ? 128 : 28, conv::cache_size() / 2);
    }

    void multiply(int64_t pixels) {
        const int64_t width = out_.channels / groups_;
        for (int64_t index = 0; index < kComponents * groups_; index++) {
            const int64_t i = index / groups_, g = index % groups_;
            conv::for_each_slice(width, weight_.depth, 1, 1, gemm::Words::kFloat, [&](const conv::Slice& slice) {
                const gemm::Product product{
                    gemm::single_tap(), pixels, slice.width, slice.length,
                    reinterpret_cast<const gemm::word*>(input_.of(i) + g * weight_.depth + slice.k), input_.pitch,
                    weight_.panel(g, slice.n / gemm::kPanel) + i * weight_.tap_pitch() + slice.k * gemm::kPanel, gemm::kPanel,
                    weight_.panel_pitch(), product_.of(i) + g * width + slice.n, product_.pitch, slice.adds(0)};
                gemm::multiply(product, gemm::Order::kRows, gemm::Words::kFloat, prefetch_);
            });
        }
    }

    const Plane in_, out_;
    const TileRows rows_;
    const conv::PackedWeight weight_;
    int64_t groups_, together_;
    StagedRows staged_;
    Components input_, product_;
    int64_t pitch_;
    float* made_;
    gemm::Prefetch prefetch_;
};

}  // namespace bnr::winograd
