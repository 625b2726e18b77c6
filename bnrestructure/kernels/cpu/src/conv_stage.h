// Staging a tile: its input pixels transformed into scratch that the matrix products read, padding included.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "conv_geometry.h"
#include "conv_pixels.h"
#include "parallel.h"

namespace bnr::conv {

// Calls f(image, pixel, count) for the tile's runs of pixels that are contiguous in a [N, H, W] tensor of this height and
// width, `pixel` counted from the tensor's start. Joined images are one run unless `by_image`.
template <class F>
void for_each_run(const Tiling& tiling, const Tile& tile, int64_t height, int64_t width, bool by_image, F&& f) {
    if (tiling.images == 1) {
        int64_t row = tile.row;
        const int64_t end = tile.row + tile.rows;
        while (row < end) {
            const int64_t image = row / height;
            const int64_t stop = by_image ? std::min(end, (image + 1) * height) : end;
            f(image, row * width, (stop - row) * width);
            row = stop;
        }
        return;
    }
    for (int64_t i = 0; i < tile.images; i++) {
        const int64_t image = tile.image + i;
        f(image, (image * height + tile.row) * width, tile.rows * width);
    }
}

// Zeros behind the channels of every group, where its words are read on to the end of a matrix tile. Nobody writes there afterwards.
inline void fill_tiles(gemm::word* data, int64_t pixels, int64_t pitch, const StagedChannels& channels) {
    const int64_t begin = words_of(channels.width, channels.words), rest = depth_of(channels.width, channels.words) - begin;
    for (int64_t i = 0; rest && i < pixels; i++) {
        for (int64_t g = 0; g < channels.runs; g++) {
            std::memset(static_cast<void*>(data + i * pitch + g * channels.group_words + begin), 0, size_t(rest) * 4);
        }
    }
}

// Scratch for the staged input of one tile at a time.
class InputStage {
  public:
    // Pixels of up to so many channels, as the words that products over channels read.
    InputStage(const Problem& p, const Window& w, const Tiling& tiling, const StagedChannels& channels, Scratch& scratch)
        : p_(p), w_(w), tiling_(tiling), channels_(channels),
          pitch_(w.joined ? channels.size : scratch_pitch(channels.size)), rows_(w.staged_rows(p, tiling.tile_rows)) {
        const int64_t pixels = tiling.tile_images * rows_ * w.columns;
        data_ = scratch.take<gemm::word>(pixels * pitch_ + gemm::kPanel);
        for (int64_t r = 0; r < tiling.tile_images * rows_; r++) {   // padding columns stay zero from here on
            gemm::word* row = data_ + r * row_pitch();
            std::memset(static_cast<void*>(row), 0, size_t(w.column_begin * pitch_) * 4);
            std::memset(static_cast<void*>(row + w.column_end * pitch_), 0, size_t((w.columns - w.column_end) * pitch_) * 4);
        }
        fill_tiles(data_, pixels, pitch_, channels);
    }

    const gemm::word* data() const { return data_; }
    int64_t pitch() const { return pitch_; }
    int64_t row_pitch() const { return w_.columns * pitch_; }
    int64_t image_pitch() const { return rows_ * row_pitch(); }

    // Fills in x's channels [channel, channel + channels). Rows of padding are zero for matrix tiles, and not touched otherwise: no
    // product reads them.
    template <class T>
    void fill(const Tile& tile, int64_t channel, int64_t channels) {
        const T* x = static_cast<const T*>(p_.x) + channel;
        if (w_.flat) {
            const int64_t begin = tile.row * p_.in_width;
            for_each_run(tiling_, tile, p_.in_height, p_.in_width, p_.gate != nullptr,
                         [&](int64_t image, int64_t pixel, int64_t count) {
                             put(x + pixel * p_.x_pitch, p_.x_pitch, count, image, channel, channels,
                                 data_ + (pixel - begin) * pitch_);
                         });
            return;
        }
        const int64_t staged = w_.staged_rows(p_, tile.rows);
        for (int64_t i = 0; i < tile.images; i++) {
            for (int64_t q = 0; q < staged; q++) {
                const int64_t joined_row = tile.row * w_.row_stride + q;
                const int64_t image = w_.free_rows ? joined_row / p_.out_height : tile.image + i;
                const int64_t row = (w_.free_rows ? joined_row % p_.out_height : joined_row) * w_.row_step - p_.padding_h;
                gemm::word* to = data_ + i * image_pitch() + q * row_pitch();
                if (row >= 0 && row < p_.in_height) {
                    const int64_t column = w_.column_begin * w_.column_step - p_.padding_w;
                    const int64_t pixel = (image * p_.in_height + row) * p_.in_width + column;
                    put(x + pixel * p_.x_pitch, p_.x_pitch * w_.column_step, w_.column_end - w_.column_begin, image, channel, channels,
                        to + w_.column_begin * pitch_);
                } else if (channels_.words == gemm::Words::kBFloat16Tile) {
                    std::memset(static_cast<void*>(to), 0, size_t(row_pitch()) * 4);
                }
            }
        }
    }

  private:
    template <class T>
    void put(const T* x, int64_t ldx, int64_t pixels, int64_t image, int64_t channel, int64_t channels, gemm::word* to) {
        for (int64_t g = 0; g < channels_.runs; g++, to += channels_.group_words) {
            const int64_t first = g * channels_.width, width = std::min(channels_.width, channels - first);
            const InputTransform t = transform_at(p_, image, channel + first);
            if (channels_.words == gemm::Words::kFloat) {
                transform_pixels(x + first, ldx, pixels, width, t, reinterpret_cast<float*>(to), pitch_);
            } else if constexpr (std::is_same_v<T, bf16>) {
                transform_pixels(x + first, ldx, pixels, width, t, reinterpret_cast<bf16*>(to), 2 * pitch_);
            }
        }
    }

    const Problem& p_;
    const Window& w_;
    const Tiling& tiling_;
    StagedChannels channels_;
    int64_t pitch_, rows_;
    gemm::word* data_;
};

// The input row that an output row of this tile reads through a kernel row lies in the image.
inline bool reads_input(const Problem& p, const Window& w, int64_t row, int64_t kernel_row) {
    if (w.free_rows) return true;
    const int64_t input = Window::input_row(p, row, kernel_row);
    return input >= 0 && input < p.in_height;
}

// A list of (A offset, B offset) that is built for a product and then used.
struct TapList {
    std::vector<int64_t> a, b;

    void clear() { a.clear(), b.clear(); }
    bool is_empty() const { return a.empty(); }
    void add(int64_t offset_a, int64_t offset_b) { a.push_back(offset_a), b.push_back(offset_b); }
    gemm::Taps taps() const { return {static_cast<int64_t>(a.size()), a.data(), b.data()}; }
    gemm::Taps swapped_taps() const { return {static_cast<int64_t>(a.size()), b.data(), a.data()}; }
};

}  // namespace bnr::conv
