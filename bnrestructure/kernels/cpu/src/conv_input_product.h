// A tile's input gradient: dx[pixel, c] from the sums over output channels and taps of D * w, through the activation's mask, where the
// per-channel sums are taken.
#pragma once

#include "conv_gradient_stage.h"
#include "conv_pack.h"
#include "statistics.h"

namespace bnr::conv {

// Rows of dx, in each of its images, that a tile finishes.
inline Range input_rows(const Problem& p, const Tile& tile) {
    const int64_t rows = p.in_height, end = tile.row + tile.rows;
    return {std::min(rows, tile.row * p.stride_h), end == p.out_height ? rows : std::min(rows, end * p.stride_h)};
}

// For one thread. T is the tensors' element type.
template <class T>
class InputProduct {
  public:
    // `sums` and `gate`: what the thread adds up, null where nobody asks for it.
    InputProduct(const Grouping& grouping, const GradientLayout& layout, const GradientStage& gradient, const PackedWeight& weight,
                 Sums* sums, double* gate, Scratch& scratch)
        : p_(layout.problem), a_(layout.arguments), w_(layout.window), tiling_(layout.tiling), grouping_(grouping), layout_(layout),
          gradient_(gradient), weight_(weight), sums_(sums), gate_(gate) {
        const int64_t extra = std::max<int64_t>(0, p_.in_height - p_.out_height * p_.stride_h);
        const int64_t out_rows = w_.flat ? tiling_.tile_rows : std::min(tiling_.tile_rows, p_.out_height);
        const int64_t rows = out_rows * p_.stride_h + extra;
        g_ = scratch.take<float>(tiling_.tile_images * rows * layout.row_pixels * kChunk);
        sum_gate_ = scratch.zeros<float>(padded(kChunk));
    }

    // Columns that are finished together.
    static constexpr int64_t kChunk = 2 * gemm::kPanel;

    // What finishing the tile will read beside its products.
    void request(const Tile& tile, gemm::Prefetch& prefetch) const {
        if (!w_.flat) return;
        const Join& join = a_.join;
        const int64_t pixel = tile.row * p_.in_width, pixels = tile.rows * p_.in_width, bytes = p_.in_channels * sizeof(T);
        if (join.y) {
            prefetch.add(static_cast<const T*>(join.y) + pixel * join.y_pitch, join.y_pitch * sizeof(T), pixels, bytes);
            prefetch.add(static_cast<const T*>(join.r) + pixel * join.r_pitch, join.r_pitch * sizeof(T), pixels, bytes);
        }
        if (!a_.accumulate) return;
        prefetch.add(static_cast<T*>(a_.dx) + pixel * a_.dx_pitch, a_.dx_pitch * sizeof(T), pixels, bytes);
    }

    // The block's channels of dx, from the tile's gradient as it is staged.
    void run(const Tile& tile, const Block& block, gemm::Prefetch& prefetch) {
        for (int64_t g = 0; g < block.groups; g++) {
            for (int64_t c = 0; c < block.in; c += kChunk) {
                const int64_t channel = block.channel + g * grouping_.in + c;
                const Part part{block.group + g, block.in_begin + c, channel, std::min(kChunk, block.in - c)};
                if (w_.flat) {
                    multiply_flat(tile, part, prefetch);
                } else if (w_.free_rows) {
                    multiply_joined(tile, part, prefetch);
                } else {
                    const Range rows = input_rows(p_, tile);
                    for (int64_t i = 0; i < tile.images; i++) {
                        multiply_rows(i, tile.image + i, rows, part, gradient_.first_row(), prefetch);
                    }
                }
            }
        }
    }

  private:
    struct Part {
        int64_t group, in_begin;      // channels of the merged group
        int64_t channel, channels;    // the same channels in x
    };

    // A few pixels at a time on matrix tiles, so that their products stay in the first-level cache.
    void multiply_flat(const Tile& tile, const Part& part, gemm::Prefetch& prefetch) {
        const int64_t few = layout_.channels.words == gemm::Words::kBFloat16Tile ? 128 : tile.rows;
        for (int64_t begin = 0; begin < tile.rows; begin += few) {
            const int64_t first = tile.row + begin, pixels = std::min(few, tile.rows - begin);
            const gemm::word* d = gradient_.data() + begin * gradient_.pitch() + part.group * layout_.channels.group_words;
            for_each_slice(part.channels, weight_.depth, 1, 1, layout_.channels.words, [&](const Slice& slice) {
                const gemm::Product product{gemm::single_tap(), pixels, slice.width, slice.length, d + slice.k,
                                            gradient_.pitch(), panel_of(part, slice), gemm::kPanel, weight_.panel_pitch(),
                                            g_ + slice.n, kChunk, slice.adds(0)};
                gemm::multiply(product, gemm::Order::kRows, layout_.channels.words, prefetch);
            });
            for_each_run(tiling_, {tile.image, tile.images, first, pixels}, p_.in_height, p_.in_width, p_.gate != nullptr,
                         [&](int64_t image, int64_t pixel, int64_t count) {
                             finish(image, pixel, count, g_ + (pixel - first) * kChunk, part);
                         });
        }
    }

    // Joined images with a stride (or a 1 x k kernel): the tile may begin and end inside images.
    void multiply_joined(const Tile& tile, const Part& part, gemm::Prefetch& prefetch) {
        int64_t row = tile.row;
        while (row < tile.row + tile.rows) {
            const int64_t image = row / p_.out_height, first = row % p_.out_height;
            const int64_t count = std::min(p_.out_height - first, tile.row + tile.rows - row);
            const int64_t begin = std::min(p_.in_height, first * p_.stride_h);
            const int64_t end = first + count == p_.out_height ? p_.in_height
                                                               : std::min(p_.in_height, (first + count) * p_.stride_h);
            multiply_rows(0, image, {begin, end}, part, tile.row - image * p_.out_height, prefetch);
            row += count;
        }
    }

    const gemm::word* panel_of(const Part& part, const Slice& slice) const {
        return weight_.panel(part.group, (part.in_begin + slice.n) / gemm::kPanel) + slice.k * gemm::kPanel;
    }

    // dx rows of one image. Output row r is staged as row r - first_staged of the tile's image i.
    void multiply_rows(int64_t i, int64_t image, Range rows, const Part& part, int64_t first_staged, gemm::Prefetch& prefetch) {
        const gemm::word* d = gradient_.data() + i * gradient_.image_pitch() - first_staged * gradient_.row_pitch() +
                        part.group * layout_.channels.group_words;
        if (layout_.crosses_rows()) return multiply_rows_together(d, image, rows, part, prefetch);
        for_each_slice(part.channels, weight_.depth, p_.kernel_h, p_.kernel_w, layout_.channels.words, [&](const Slice& slice) {
            for (int64_t row = rows.begin; row < rows.end; row++) {
                const int64_t first = first_kernel_row(row);
                if (slice.ends_before(first)) continue;
                float* g = g_ + (row - rows.begin) * p_.in_width * kChunk + slice.n;
                for (int64_t phase = 0; phase < std::min(p_.stride_w, p_.in_width); phase++) {
                    taps_of(row, phase, slice.rows);
                    if (slice.adds(first) && list_.is_empty()) continue;
                    const gemm::Product product{
                        list_.taps(), ceil_div(p_.in_width - phase, p_.stride_w), slice.width, slice.length, d + slice.k,
                        gradient_.pitch(), panel_of(part, slice), gemm::kPanel, weight_.panel_pitch(),
                        g + phase * kChunk, p_.stride_w * kChunk, slice.adds(first)};
                    gemm::multiply(product, gemm::Order::kRows, layout_.channels.words, prefetch);
                }
            }
        });
        // Where no output pixel reads a row, its gradient is zero and there is nothing to add to dx; a join's mask remains to be applied.
        int64_t begin = rows.begin;
        for (int64_t row = rows.begin; row < rows.end && a_.accumulate && !a_.join.y; row++) {
            if (has_readers(row)) continue;
            finish_rows(image, rows.begin, {begin, row}, part);
            begin = row + 1;
        }
        finish_rows(image, rows.begin, {begin, rows.end}, part);
    }

    // Of a stride of one, on matrix tiles: all rows as one, through rows and columns of zeros around the output gradient.
    void multiply_rows_together(const gemm::word* d, int64_t image, Range rows, const Part& part, gemm::Prefetch& prefetch) {
        const int64_t row_pixels = layout_.row_pixels;
        for_each_slice(part.channels, weight_.depth, p_.kernel_h, p_.kernel_w, layout_.channels.words, [&](const Slice& slice) {
            list_.clear();
            for (int64_t i = slice.rows.begin; i < slice.rows.end; i++) {
                for (int64_t j = 0; j < p_.kernel_w; j++) {
                    const int64_t row = rows.begin + p_.padding_h - i * p_.dilation_h;
                    const int64_t column = gradient_.columns_before() + p_.padding_w - j * p_.dilation_w;
                    list_.add(row * gradient_.row_pitch() + column * gradient_.pitch(),
                              (i * p_.kernel_w + j) * weight_.tap_pitch());
                }
            }
            const gemm::Product product{
                list_.taps(), (rows.size() - 1) * row_pixels + p_.in_width, slice.width, slice.length, d + slice.k,
                gradient_.pitch(), panel_of(part, slice), gemm::kPanel, weight_.panel_pitch(), g_ + slice.n, kChunk,
                slice.adds(0)};
            gemm::multiply(product, gemm::Order::kRows, layout_.channels.words, prefetch);
        });
        for (int64_t row = rows.begin; row < rows.end; row++) {
            finish(image, (image * p_.in_height + row) * p_.in_width, p_.in_width,
                   g_ + (row - rows.begin) * row_pixels * kChunk, part);
        }
    }

    // The output row that reads this input row through a kernel row, or -1.
    int64_t reader(int64_t row, int64_t kernel_row) const {
        const int64_t up = row + p_.padding_h - kernel_row * p_.dilation_h;
        return up >= 0 && up % p_.stride_h == 0 && up / p_.stride_h < p_.out_height ? up / p_.stride_h : -1;
    }

    bool has_readers(int64_t row) const { return reader(row, first_kernel_row(row)) >= 0; }

    // The first kernel row through which an output row reads this input row; 0 where none does, so that the first slice
    // writes zeros.
    int64_t first_kernel_row(int64_t row) const {
        for (int64_t i = 0; i < p_.kernel_h; i++) {
            if (reader(row, i) >= 0) return i;
        }
        return 0;
    }

    // The taps of every stride_w-th pixel of an input row, from column `phase` on.
    void taps_of(int64_t row, int64_t phase, Range kernel_rows) {
        list_.clear();
        for (int64_t i = kernel_rows.begin; i < kernel_rows.end; i++) {
            const int64_t out_row = reader(row, i);
            if (out_row < 0) continue;
            for (int64_t j = 0; j < p_.kernel_w; j++) {
                const int64_t left = phase + p_.padding_w - j * p_.dilation_w;
                if (left % p_.stride_w) continue;
                list_.add(out_row * gradient_.row_pitch() +
                              (left / p_.stride_w + gradient_.columns_before()) * gradient_.pitch(),
                          (i * p_.kernel_w + j) * weight_.tap_pitch());
            }
        }
    }

    // Rows of the image; g_ begins with row `first`.
    void finish_rows(int64_t image, int64_t first, Range rows, const Part& part) {
        if (rows.size() <= 0) return;
        finish(image, (image * p_.in_height + rows.begin) * p_.in_width, rows.size() * p_.in_width,
               g_ + (rows.begin - first) * p_.in_width * kChunk, part);
    }

    // Mask, sums, and on to dx: `count` pixels from `pixel` on, all of one image.
    void finish(int64_t image, int64_t pixel, int64_t count, const float* g, const Part& part) {
        const T* x = static_cast<const T*>(p_.x) + pixel * p_.x_pitch + part.channel;
        T* dx = static_cast<T*>(a_.dx) + pixel * a_.dx_pitch + part.channel;
        const InputTransform t = transform_at(p_, image, part.channel);
        const bool accumulate = a_.accumulate != 0;
        const auto factor = static_cast<float>(1 / a_.gradient_factor);
        if (p_.gate) {
            gated_gradient_pixels(g, kChunk, x, p_.x_pitch, count, part.channels, t, factor, dx, a_.dx_pitch, accumulate,
                                  sum_gate_);
            double* gate = gate_ + image * p_.in_channels + part.channel;
            for (int64_t c = 0; c < part.channels; c++) gate[c] += sum_gate_[c];
            for (int64_t c = 0; c < padded(kChunk); c++) sum_gate_[c] = 0;
            return;
        }
        if (a_.join.y) {
            Sums& sums = *sums_;
            join_gradient_pixels(g, kChunk, a_.join, pixel, part.channel, count, part.channels, factor, dx, a_.dx_pitch,
                                 accumulate, {sums[0] + part.channel, sums[1] + part.channel, sums[2] + part.channel});
            return;
        }
        float* sum_p = nullptr;
        float* sum_px = nullptr;
        if (sums_) sum_p = (*sums_)[0] + part.channel, sum_px = (*sums_)[1] + part.channel;
        input_gradient_pixels(g, kChunk, x, p_.x_pitch, count, part.channels, t, factor, dx, a_.dx_pitch, accumulate,
                              sum_p, sum_px);
    }

    const Problem& p_;
    const BackwardArguments& a_;
    const Window& w_;
    const Tiling& tiling_;
    const Grouping& grouping_;
    const GradientLayout& layout_;
    const GradientStage& gradient_;
    const PackedWeight& weight_;
    Sums* sums_;
    double* gate_;
    TapList list_;
    float* g_;
    float* sum_gate_;
};

}  // namespace bnr::conv
