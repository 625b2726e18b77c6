// A tile's part of the weight gradient: dW[n, tap, c] += sum over pixels of D[pixel, n] * z[pixel at tap, c].
#pragma once

#include <memory>

#include "conv_gradient_stage.h"
#include "conv_pairs.h"
#include "conv_stage.h"

namespace bnr::conv {

// Where a block's sums are: output channel n, tap t, channel c (of those that the block has in each group) is at
// data[n * row_pitch + t * tap_pitch + c]; transposed, at data[(t * tap_pitch + c) * row_pitch + n].
struct WeightSums {
    float* data;
    int64_t row_pitch, tap_pitch;
};

// A row of the kernel over few channels leaves half of a vector idle; the output channels of such a layer do not.
inline bool transposes_sums(const Window& w) { return w.joined; }

class WeightProduct {
  public:
    // For blocks of up to `channels` input channels.
    WeightProduct(const Problem& p, const Window& w, const Tiling& tiling, gemm::Words words, int64_t channels, Scratch& scratch)
        : p_(p), w_(w), words_(words), stage_(p, w, tiling, StagedChannels(1, channels, words), scratch) {
        if (words != gemm::Words::kFloat) pairs_ = std::make_unique<InputPairs>(p, w, tiling, words, channels, scratch);
    }

    // Stages the block's input of this tile and adds its products with `d`, the tile's own rows of D. Without `accumulate`
    // the sums are overwritten. `out`: output channels of each group.
    template <class T>
    void run(const Tile& tile, const Block& block, int64_t out, const GradientStage::View& d, const WeightSums& sums,
             bool accumulate, gemm::Prefetch& prefetch) {
        stage_.template fill<T>(tile, block.channel, block.channels);
        if (pairs_) pairs_->fill(stage_, tile, block.channels);
        if (words_ == gemm::Words::kBFloat16Tile) return run_tiles(tile, block, out, d, sums, accumulate, prefetch);
        const bool pairs = pairs_ != nullptr;
        const gemm::word* z = pairs ? pairs_->data() : stage_.data();
        const int64_t pitch = pairs ? pairs_->pitch() : stage_.pitch();
        const int64_t row_pitch = pairs ? pairs_->row_pitch() : stage_.row_pitch();
        const int64_t image_pitch = pairs ? pairs_->image_pitch() : stage_.image_pitch();
        const int64_t depth = w_.flat ? tile.rows * p_.out_width : p_.out_width;
        const int64_t step = pairs ? pairs_->step() : w_.column_stride * pitch;
        const int64_t columns = w_.joined ? p_.kernel_w * block.in : block.in;
        const int64_t in_each = block.channels / block.groups;
        for (int64_t i = 0; i < p_.kernel_h; i++) {
            list_.clear();
            for (int64_t image = 0; image < tile.images; image++) {
                for (int64_t r = 0; r < (w_.flat ? 1 : tile.rows); r++) {
                    if (!reads_input(p_, w_, tile.row + r, i)) continue;
                    list_.add(image * d.image_pitch + r * d.row_pitch,
                              image * image_pitch + (r * w_.row_stride + i * p_.dilation_h) * row_pitch);
                }
            }
            for (int64_t j = 0; j < (w_.joined ? 1 : p_.kernel_w); j++) {
                for (int64_t g = 0; g < block.groups; g++) {
                    if (transposes_sums(w_)) {
                        const gemm::Product product{
                            list_.swapped_taps(), columns, out, pairs ? ceil_div(depth, 2) : depth, z, step, d.data, d.pitch,
                            gemm::kPanel, sums.data + i * p_.kernel_w * sums.tap_pitch * sums.row_pitch, sums.row_pitch,
                            accumulate};
                        gemm::multiply(product, gemm::Order::kColumns, words_, prefetch);
                        continue;
                    }
                    const int64_t n = (block.group + g) * out;
                    const gemm::Product product{
                        list_.taps(), out, columns, pairs ? ceil_div(depth, 2) : depth, d.data + n, d.pitch,
                        z + j * p_.dilation_w * pitch + g * in_each, step, gemm::kPanel,
                        sums.data + n * sums.row_pitch + (i * p_.kernel_w + j) * sums.tap_pitch, sums.row_pitch, accumulate};
                    gemm::multiply(product, gemm::Order::kColumns, words_, prefetch);
                }
            }
        }
    }

  private:
    // On matrix tiles: D by channel (transpose_pairs), so that its rows run along k; across the tile's rows, where they may.
    void run_tiles(const Tile& tile, const Block& block, int64_t out, const GradientStage::View& d, const WeightSums& sums,
                   bool accumulate, gemm::Prefetch& prefetch) {
        const bool crosses = w_.pairs_cross_rows(p_);
        const int64_t pairs = w_.flat ? ceil_div(tile.rows * p_.out_width, 2) : (crosses ? tile.rows : 1) * d.row_pitch;
        for (int64_t i = 0; i < p_.kernel_h; i++) {
            list_runs(tile, d, i, crosses);
            for (int64_t j = 0; j < p_.kernel_w; j++) {
                for (int64_t g = 0; g < block.groups; g++) {
                    const int64_t n = (block.group + g) * out;
                    const gemm::Product product{
                        list_.taps(), out, block.in, round_up(pairs, gemm::kTileWords), d.data + n * d.pitch, d.pitch,
                        pairs_->data() + j * p_.dilation_w * pairs_->pitch() + g * block.channels / block.groups, pairs_->step(),
                        gemm::kPanel, sums.data + n * sums.row_pitch + (i * p_.kernel_w + j) * sums.tap_pitch, sums.row_pitch,
                        accumulate};
                    gemm::multiply(product, gemm::Order::kRows, words_, prefetch);
                }
            }
        }
    }

    // Where the runs of pixels begin that a row of the kernel pairs: an image's, or, where rows are not crossed, a row's.
    void list_runs(const Tile& tile, const GradientStage::View& d, int64_t kernel_row, bool crosses) {
        list_.clear();
        for (int64_t image = 0; image < tile.images; image++) {
            for (int64_t r = 0; r < (crosses ? 1 : tile.rows); r++) {
                if (!crosses && !reads_input(p_, w_, tile.row + r, kernel_row)) continue;
                const int64_t row = r * w_.row_stride + kernel_row * p_.dilation_h;
                list_.add(image * d.image_pitch + r * d.row_pitch, image * pairs_->image_pitch() + row * pairs_->row_pitch());
            }
        }
    }

    const Problem& p_;
    const Window& w_;
    gemm::Words words_;
    InputStage stage_;
    std::unique_ptr<InputPairs> pairs_;
    TapList list_;
};

}  // namespace bnr::conv
