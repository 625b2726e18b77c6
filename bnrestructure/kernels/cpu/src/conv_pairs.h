// bfloat16 scratch of the backward pass once more, each word a pair of the same channel of two pixels: how products that sum over
// pixels read both operands.
#pragma once

#include "conv_stage.h"

namespace bnr::conv {

// Pixel i of `first` and of `second` as the two halves of a word, which is how products that sum over pixels read
// bfloat16. `second` null: zeros. The pitches of the sources are in values, out's in words.
void pair_pixels(const bf16* first, const bf16* second, int64_t ld, int64_t pixels, int64_t channels, gemm::word* out,
                 int64_t ldo);

// The same of 2 k and 2 k + 1 of so many pixels with the pixels side by side: word k of channel c at out[c * ldo + k], for k below
// `words`; zeros from `pixels` on. Only matrix tiles read it.
void transpose_pairs(const bf16* from, int64_t ld, int64_t pixels, int64_t channels, gemm::word* out, int64_t ldo, int64_t words);

// The staged input once more, each word a pair of the same channel of two pixels that neighbouring output pixels read.
class InputPairs {
  public:
    InputPairs(const Problem& p, const Window& w, const Tiling& tiling, gemm::Words words, int64_t channels, Scratch& scratch)
        : p_(p), w_(w), pitch_(w.joined ? channels : scratch_pitch(channels)),
          rows_(w.staged_rows(p, tiling.tile_rows)) {
        const int64_t pixels = w.flat ? ceil_div(tiling.tile_rows * p.out_width, 2) : tiling.tile_images * rows_ * w.columns;
        if (words == gemm::Words::kBFloat16Tile) {   // a tile reads on to its end, and multiplies that by zeros
            const int64_t beyond = (w.row_stride - 1) * w.columns + (p.kernel_w - 1) * p.dilation_w;   // the last row's
            data_ = scratch.zeros<gemm::word>((pixels + beyond) * pitch_ + gemm::kTileWords * step());
        } else {
            data_ = scratch.take<gemm::word>(pixels * pitch_ + gemm::kPanel);
        }
    }

    void fill(const InputStage& stage, const Tile& tile, int64_t channels) {
        const int64_t ld = 2 * stage.pitch();
        if (w_.flat) {
            const bf16* first = reinterpret_cast<const bf16*>(stage.data());
            const int64_t pixels = tile.rows * p_.out_width;
            pair_pixels(first, first + ld, 2 * ld, pixels / 2, channels, data_, pitch_);
            if (pixels % 2) {
                pair_pixels(first + (pixels - 1) * ld, nullptr, ld, 1, channels, data_ + pixels / 2 * pitch_, 0);
            }
            return;
        }
        const int64_t paired = std::max<int64_t>(0, w_.columns - w_.column_stride), staged = w_.staged_rows(p_, tile.rows);
        for (int64_t i = 0; i < tile.images; i++) {
            for (int64_t q = 0; q < staged; q++) {
                const bf16* row = reinterpret_cast<const bf16*>(stage.data() + i * stage.image_pitch() + q * stage.row_pitch());
                gemm::word* to = data_ + i * image_pitch() + q * row_pitch();
                pair_pixels(row, row + w_.column_stride * ld, ld, paired, channels, to, pitch_);
                pair_pixels(row + paired * ld, nullptr, ld, w_.columns - paired, channels, to + paired * pitch_, pitch_);
            }
        }
    }

    const gemm::word* data() const { return data_; }
    int64_t pitch() const { return pitch_; }
    int64_t step() const { return w_.flat ? pitch_ : 2 * w_.column_stride * pitch_; }   // from pair to pair
    int64_t row_pitch() const { return w_.columns * pitch_; }
    int64_t image_pitch() const { return rows_ * row_pitch(); }

  private:
    const Problem& p_;
    const Window& w_;
    int64_t pitch_, rows_;
    gemm::word* data_;
};

}  // namespace bnr::conv
