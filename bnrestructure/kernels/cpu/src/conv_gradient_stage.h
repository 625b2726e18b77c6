// Staging a tile for the backward products: its output gradient, with the neighbouring rows and the zeros that the input gradient
// needs; and, for bfloat16, once more as pairs of pixels for the weight gradient.
#pragma once

#include "conv_pairs.h"
#include "conv_stage.h"
#include "statistics.h"

namespace bnr::conv {

// Which rows and columns of dY a tile stages.
struct GradientLayout {
    GradientLayout(const Problem& p, const BackwardArguments& a, const Window& w, const Tiling& tiling, const StagedChannels& channels)
        : problem(p), arguments(a), window(w), tiling(tiling), channels(channels),
          pitch(scratch_pitch(channels.size)) {
        halo = a.dx && !w.flat;
        if (halo) {
            const int64_t first = ceil_quotient(p.padding_w - (p.kernel_w - 1) * p.dilation_w, p.stride_w);
            const int64_t last = floor_quotient(p.in_width - 1 + p.padding_w, p.stride_w);
            columns_before = std::max<int64_t>(0, -first);
            columns = columns_before + std::max(p.out_width, last + 1);
        } else {
            columns_before = 0, columns = p.out_width;
        }
        // Rows of zeros above and below an image, too, where matrix tiles cross from row to row.
        const bool crosses = channels.words == gemm::Words::kBFloat16Tile && halo && p.stride_h == 1 && p.stride_w == 1;
        row_pixels = crosses && columns < round_up(p.in_width, gemm::kTileWords) ? columns : p.in_width;
        rows = 0;
        for (int64_t s = 0; s < tiling.strips; s++) rows = std::max(rows, needed_rows(tiling.at(s)).size());
    }

    // Output rows that the tile's input rows depend on, and its own.
    Range needed_rows(const Tile& tile) const {
        const Problem& p = problem;
        Range r{tile.row, tile.row + tile.rows};
        if (!halo || window.free_rows) return r;
        const int64_t begin = tile.row * p.stride_h;
        const int64_t end = r.end == p.out_height ? p.in_height : std::min(p.in_height, r.end * p.stride_h);
        r.begin = std::min(r.begin, ceil_quotient(begin + p.padding_h - (p.kernel_h - 1) * p.dilation_h, p.stride_h));
        r.end = std::max(r.end, floor_quotient(end - 1 + p.padding_h, p.stride_h) + 1);
        if (crosses_rows()) return r;
        return {std::max<int64_t>(0, r.begin), std::min(p.out_height, r.end)};
    }

    bool crosses_rows() const { return row_pixels != problem.in_width; }

    // dy serves as it is: nothing to apply, and a pitch that spreads over the cache's sets.
    bool is_direct() const {
        return window.flat && !problem.bfloat16() && !arguments.s && !arguments.a && arguments.dy_pitch % 1024 != 0;
    }

    const Problem& problem;
    const BackwardArguments& arguments;
    const Window& window;
    const Tiling& tiling;
    StagedChannels channels;           // of the output
    int64_t pitch;                     // words from pixel to pixel
    bool halo;
    int64_t columns_before, columns;   // zero columns on the left; all columns
    int64_t rows;                      // the most that a tile needs
    int64_t row_pixels;                // from one row of the input gradient's product to the next
};

class GradientStage {
  public:
    struct View {
        const gemm::word* data;
        int64_t pitch, row_pitch, image_pitch;
    };

    GradientStage(const GradientLayout& layout, Scratch& scratch) : l_(layout) {
        const int64_t lines = l_.tiling.tile_images * l_.rows;
        if (!l_.is_direct()) staged_ = scratch.take<gemm::word>(lines * row_pitch() + gemm::kPanel);
        const int64_t after = l_.columns - l_.columns_before - l_.problem.out_width;
        for (int64_t r = 0; staged_ && r < lines; r++) {
            gemm::word* row = staged_ + r * row_pitch();
            std::memset(static_cast<void*>(row), 0, size_t(l_.columns_before * l_.pitch) * 4);
            std::memset(static_cast<void*>(row + (l_.columns - after) * l_.pitch), 0, size_t(after * l_.pitch) * 4);
        }
        if (staged_ && l_.arguments.dx) fill_tiles(staged_, lines * l_.columns, l_.pitch, l_.channels);
        if (!l_.arguments.weight_gradient) return;
        if (is_tiled()) {
            pairs_ = scratch.take<gemm::word>(l_.problem.out_channels * pairs_pitch());
        } else if (l_.channels.words == gemm::Words::kBFloat16Pair) {
            const int64_t pixels = l_.window.flat ? ceil_div(l_.tiling.tile_rows * l_.problem.out_width, 2)
                                                  : l_.tiling.tile_images * l_.tiling.tile_rows * pairs_in_row();
            pairs_ = scratch.take<gemm::word>(pixels * pairs_pitch());
        }
    }

    const gemm::word* data() const { return data_; }
    int64_t pitch() const { return pitch_; }
    int64_t row_pitch() const { return l_.columns * l_.pitch; }
    int64_t image_pitch() const { return l_.rows * row_pitch(); }
    int64_t columns_before() const { return l_.columns_before; }
    int64_t first_row() const { return rows_.begin; }   // the output row that is staged first

    template <class T>
    void fill(const Tile& tile) {
        const Problem& p = l_.problem;
        const BackwardArguments& a = l_.arguments;
        rows_ = l_.needed_rows(tile);
        const T* dy = static_cast<const T*>(a.dy);
        if (!staged_) {
            data_ = reinterpret_cast<const gemm::word*>(dy + tile.row * p.out_width * a.dy_pitch);
            pitch_ = a.dy_pitch;
            return;
        }
        data_ = staged_, pitch_ = l_.pitch;
        const auto factor = static_cast<float>(a.gradient_factor);
        const auto put = [&](int64_t pixel, int64_t count, gemm::word* to) {
            for (int64_t g = 0; g < l_.channels.runs; g++, to += l_.channels.group_words) {
                const int64_t c = g * l_.channels.width;
                const T* from = dy + pixel * a.dy_pitch + c;
                const T* y = static_cast<const T*>(a.y) + pixel * a.y_pitch + c;
                const OutputEdge edge{a.s ? a.s + c : nullptr, a.a ? a.a + c : nullptr, a.b ? a.b + c : nullptr,
                                      a.y_mean ? a.y_mean + c : nullptr};
                if (l_.channels.words == gemm::Words::kFloat) {
                    output_gradient_pixels(from, a.dy_pitch, y, a.y_pitch, count, l_.channels.width, edge, factor,
                                           reinterpret_cast<float*>(to), l_.pitch);
                } else if constexpr (std::is_same_v<T, bf16>) {
                    output_gradient_pixels(from, a.dy_pitch, y, a.y_pitch, count, l_.channels.width, edge, factor,
                                           reinterpret_cast<bf16*>(to), 2 * l_.pitch);
                }
            }
        };
        const int64_t image_rows = l_.tiling.image_rows;
        if (l_.window.flat) {
            put(tile.row * p.out_width, tile.rows * p.out_width, staged_);
        } else {
            for (int64_t i = 0; i < tile.images; i++) {
                const int64_t first_row = l_.window.free_rows ? 0 : (tile.image + i) * p.out_height;
                for (int64_t r = rows_.begin; r < rows_.end; r++) {
                    gemm::word* row = staged_ + i * image_pitch() + (r - rows_.begin) * row_pitch();
                    if (l_.crosses_rows() && (r < 0 || r >= image_rows)) {
                        std::memset(static_cast<void*>(row), 0, size_t(row_pitch()) * 4);
                    } else {
                        put((first_row + r) * p.out_width, p.out_width, row + l_.columns_before * l_.pitch);
                    }
                }
            }
        }
        if (pairs_ && is_tiled()) fill_transposed(tile);
        else if (pairs_) fill_pairs(tile);
    }

    // The tile's own rows, without the neighbours', as the weight gradient reads them.
    // Pairs are by pixel, or, for matrix tiles, by channel, whose pitch is the first one.
    View own_rows(const Tile& tile) const {
        if (is_tiled()) return {pairs_, pairs_pitch(), l_.window.pairs_in_row(l_.problem), pairs_in_image()};
        if (pairs_) {
            const int64_t row = pairs_in_row() * pairs_pitch();
            return {pairs_, pairs_pitch(), row, tile.rows * row};
        }
        return {natural_rows(tile), pitch_, row_pitch(), image_pitch()};
    }

    // sum[c] += sum of dY over the tile's own pixels, before it is rounded: that of a bias in front of a batch norm is zero,
    // and whatever is rounded off would be all that is left of it.
    template <class T>
    void add_bias(const Tile& tile, float* sum) const {
        const Problem& p = l_.problem;
        const BackwardArguments& a = l_.arguments;
        for_each_run(l_.tiling, tile, p.out_height, p.out_width, false, [&](int64_t, int64_t pixel, int64_t count) {
            add_output_gradient(static_cast<const T*>(a.dy) + pixel * a.dy_pitch, a.dy_pitch,
                                static_cast<const T*>(a.y) + pixel * a.y_pitch, a.y_pitch, count, p.out_channels,
                                {a.s, a.a, a.b, a.y_mean}, sum);
        });
    }

  private:
    int64_t pairs_in_row() const { return ceil_div(l_.problem.out_width, 2); }
    int64_t pairs_pitch() const {
        return scratch_pitch(is_tiled() ? l_.tiling.tile_images * pairs_in_image() : l_.problem.out_channels);
    }
    bool is_tiled() const { return l_.channels.words == gemm::Words::kBFloat16Tile; }
    int64_t pairs_in_image() const {
        const int64_t rows = l_.tiling.tile_rows;
        return round_up(l_.window.flat ? ceil_div(rows * l_.problem.out_width, 2) : rows * l_.window.pairs_in_row(l_.problem),
                        gemm::kTileWords);
    }
    const gemm::word* natural_rows(const Tile& tile) const {
        return l_.window.flat ? data_ : data_ + (tile.row - rows_.begin) * row_pitch() + l_.columns_before * l_.pitch;
    }

    void fill_pairs(const Tile& tile) {
        const Problem& p = l_.problem;
        const int64_t ld = 2 * l_.pitch, channels = p.out_channels;
        const auto pair_run = [&](const gemm::word* from, int64_t pixels, gemm::word* to) {
            const bf16* first = reinterpret_cast<const bf16*>(from);
            pair_pixels(first, first + ld, 2 * ld, pixels / 2, channels, to, pairs_pitch());
            if (pixels % 2) {
                pair_pixels(first + (pixels - 1) * ld, nullptr, ld, 1, channels, to + pixels / 2 * pairs_pitch(), 0);
            }
        };
        if (l_.window.flat) return pair_run(staged_, tile.rows * p.out_width, pairs_);
        gemm::word* to = pairs_;
        for (int64_t i = 0; i < tile.images; i++) {
            for (int64_t r = 0; r < tile.rows; r++, to += pairs_in_row() * pairs_pitch()) {
                pair_run(natural_rows(tile) + i * image_pitch() + r * row_pitch(), p.out_width, to);
            }
        }
    }

    // All words of the tile's rows, those of a shorter tile than others too; zeros where they hold no pixel.
    void fill_transposed(const Tile& tile) {
        const Problem& p = l_.problem;
        const auto put = [&](const gemm::word* from, int64_t pixels, int64_t to, int64_t words) {
            for (int64_t g = 0; g < l_.channels.runs; g++, from += l_.channels.group_words, to += l_.channels.width * pairs_pitch()) {
                transpose_pairs(reinterpret_cast<const bf16*>(from), 2 * l_.pitch, pixels, l_.channels.width, pairs_ + to,
                                pairs_pitch(), words);
            }
        };
        if (l_.window.flat) return put(staged_, tile.rows * p.out_width, 0, pairs_in_image());
        const int64_t words = l_.window.pairs_in_row(p);
        for (int64_t i = 0; i < tile.images; i++) {
            const gemm::word* row = natural_rows(tile) + i * image_pitch();
            const int64_t begin = i * pairs_in_image();
            for (int64_t r = 0; r < tile.rows; r++) {
                const int64_t to = r * words, count = r + 1 < tile.rows ? words : pairs_in_image() - to;
                put(row + r * row_pitch(), p.out_width, begin + to, count);
            }
        }
    }

    const GradientLayout& l_;
    gemm::word* staged_ = nullptr;
    gemm::word* pairs_ = nullptr;
    const gemm::word* data_ = nullptr;
    int64_t pitch_ = 0;
    Range rows_{0, 0};
};

}  // namespace bnr::conv
