// The fused convolution, backward: each tile's output gradient is staged once for both products. The weight gradient sums
// over pixels into accumulators of each thread; the input gradient goes through the activation's mask, where the per-channel
// sums are taken, straight to dx.
#include <memory>

#include "conv_gradient_stage.h"
#include "conv_pack.h"
#include "conv_stage.h"
#include "conv_weight_gradient.h"
#include "conv_weight_product.h"
#include "library.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

using gemm::Order;
using gemm::Words;
using gemm::word;

constexpr int64_t kBlockChannels = 512;   // input channels staged together
constexpr int64_t kChunk = 2 * gemm::kPanel;   // columns of an input gradient that are finished together

template <class T>
class Backward {
  public:
    Backward(const BackwardArguments& arguments, const Problem& problem)
        : a_(arguments), p_(problem), grouping_(p_, kBlockChannels), words_(words_for(p_, grouping_)),
          channels_(grouping_.groups, grouping_.out, words_), need_x_(a_.dx), need_weight_(a_.weight_gradient), window_(p_, words_, true),
          tiling_(p_, window_, row_bytes(), ceil_div(p_.kernel_h - 1, p_.stride_h), cache_size() / 2,
                  words_ == Words::kBFloat16Tile ? 512 : 256),
          gradient_(p_, a_, window_, tiling_, channels_), taps_(p_.kernel_h * p_.kernel_w),
          weight_row_(scratch_pitch(transposes_sums(window_) ? p_.out_channels : taps_ * grouping_.in)),
          weight_size_((transposes_sums(window_) ? taps_ * grouping_.in : p_.out_channels) * weight_row_ + gemm::kPanel) {}

    void run() {
        Scratch scratch;
        const int64_t depth = depth_of(grouping_.out, words_);
        if (need_x_) {
            weight_ = pack_weight(p_, grouping_, true, words_,
                                  scratch.take<word>(PackedWeight::size(grouping_.groups, taps_, depth, grouping_.in)));
        }
        const int64_t threads = std::min(p_.threads, tiling_.count);
        std::vector<std::unique_ptr<Shared>> shared;
        for (int64_t t = 0; t < threads; t++) shared.push_back(std::make_unique<Shared>(*this, scratch));
        parallel(threads, [&](int64_t t) { Worker(*this, *shared[t], share(tiling_.count, 1, t, threads)).run(); });
        finish(shared);
    }

  private:
    // What a thread adds up; it outlives the parallel region.
    struct Shared {
        Shared(const Backward& b, Scratch& scratch) {
            const Problem& p = b.p_;
            if (b.need_x_ && b.a_.sum_p) sums = std::make_unique<Sums>(scratch, p.in_channels, b.a_.join.y ? 3 : 2);
            if (b.need_x_ && p.gate) gate = scratch.zeros<double>(p.batch * p.in_channels);
            if (b.a_.bias_gradient) bias = std::make_unique<Sums>(scratch, p.out_channels, 1);
            if (b.need_weight_) weight = scratch.take<float>(b.weight_size_);
        }
        std::unique_ptr<Sums> sums, bias;
        double* gate = nullptr;
        float* weight = nullptr;
    };

    int64_t row_bytes() const {
        const int64_t x = window_.columns * window_.row_stride *
                          scratch_pitch(words_of(std::min(p_.in_channels, kBlockChannels), words_));
        const int64_t d = p_.out_width * scratch_pitch(channels_.size);
        const bool tiles = words_ == Words::kBFloat16Tile;
        const int64_t g = need_x_ ? p_.in_width * p_.stride_h * (kChunk + (tiles ? p_.in_channels : 0)) : 0;   // and x and dx
        if (words_ == Words::kFloat) return (x + d + g) * 4;
        return ((need_weight_ ? 3 * x + 2 * d : d) + g) * 4;   // both once more as pairs of pixels, the input's for every pixel
    }

    void finish(const std::vector<std::unique_ptr<Shared>>& shared) {
        Shared& first = *shared[0];
        for (std::size_t t = 1; t < shared.size(); t++) {
            if (first.sums) first.sums->merge(*shared[t]->sums);
            if (first.bias) first.bias->merge(*shared[t]->bias);
            for (int64_t i = 0; first.gate && i < p_.batch * p_.in_channels; i++) first.gate[i] += shared[t]->gate[i];
        }
        if (first.sums) first.sums->write(0, a_.sum_p), first.sums->write(1, a_.sum_px);
        if (first.sums && a_.sum_pr) first.sums->write(2, a_.sum_pr);
        if (first.bias) first.bias->write(0, a_.bias_gradient);
        for (int64_t i = 0; first.gate && i < p_.batch * p_.in_channels; i++) {
            a_.gate_gradient[i] = static_cast<float>(first.gate[i]);
        }
        if (!need_weight_) return;
        std::vector<float*> parts;
        for (const auto& s : shared) parts.push_back(s->weight);
        write_weight_gradient(a_, grouping_, parts, weight_row_, transposes_sums(window_));
    }

    class Worker {
      public:
        Worker(const Backward& b, Shared& shared, Range tiles)
            : b_(b), p_(b.p_), w_(b.window_), shared_(shared), tiles_(tiles), gradient_(b.gradient_, scratch_) {
            if (b.need_weight_) {
                weight_ = std::make_unique<WeightProduct>(p_, w_, b.tiling_, b.words_, block_channels(), scratch_);
            }
            if (b.need_x_) {
                const int64_t extra = std::max<int64_t>(0, p_.in_height - p_.out_height * p_.stride_h);
                const int64_t out_rows = w_.flat ? b.tiling_.tile_rows : std::min(b.tiling_.tile_rows, p_.out_height);
                const int64_t rows = out_rows * p_.stride_h + extra;
                g_ = scratch_.take<float>(b.tiling_.tile_images * rows * b.gradient_.row_pixels * kChunk);
                sum_gate_ = scratch_.zeros<float>(padded(kChunk));
            }
        }

        void run() {
            for (int64_t index = tiles_.begin; index < tiles_.end; index++) {
                const Tile tile = b_.tiling_.at(index);
                gradient_.template fill<T>(tile);
                if (shared_.bias) gradient_.template add_bias<T>(tile, (*shared_.bias)[0]), shared_.bias->flush();
                prefetch_.clear();
                request_gradient(tile);
                if (index + 1 < tiles_.end) request(b_.tiling_.at(index + 1));
                for (const Block& block : b_.grouping_.blocks) {
                    if (b_.need_weight_) {
                        const WeightSums sums{shared_.weight + block.in_begin, b_.weight_row_, b_.grouping_.in};
                        weight_->template run<T>(tile, block, b_.grouping_.out, gradient_.own_rows(tile), sums,
                                                 index != tiles_.begin, prefetch_);
                    }
                    if (b_.need_x_) multiply_input(tile, block);
                }
                if (shared_.sums) shared_.sums->flush();
            }
        }

      private:
        int64_t block_channels() const {
            int64_t most = 0;
            for (const Block& block : b_.grouping_.blocks) most = std::max(most, block.channels);
            return most;
        }

        // Rows of dx, in each of its images, that a tile finishes.
        Range input_rows(const Tile& tile) const {
            const int64_t rows = p_.in_height, end = tile.row + tile.rows;
            return {std::min(rows, tile.row * p_.stride_h), end == p_.out_height ? rows : std::min(rows, end * p_.stride_h)};
        }

        void multiply_input(const Tile& tile, const Block& block) {
            for (int64_t g = 0; g < block.groups; g++) {
                for (int64_t c = 0; c < block.in; c += kChunk) {
                    const int64_t channel = block.channel + g * b_.grouping_.in + c;
                    const Part part{block.group + g, block.in_begin + c, channel, std::min(kChunk, block.in - c)};
                    if (w_.flat) {
                        multiply_flat_input(tile, part);
                    } else if (w_.free_rows) {
                        multiply_free_input(tile, part);
                    } else {
                        const Range rows = input_rows(tile);
                        for (int64_t i = 0; i < tile.images; i++) {
                            multiply_rows(i, tile.image + i, rows, part, gradient_.first_row());
                        }
                    }
                }
            }
        }

        struct Part {
            int64_t group, in_begin;      // channels of the merged group
            int64_t channel, channels;    // the same channels in x
        };

        // A few pixels at a time on matrix tiles, so that their products stay in the first-level cache.
        void multiply_flat_input(const Tile& tile, const Part& part) {
            const int64_t few = b_.words_ == Words::kBFloat16Tile ? 128 : tile.rows;
            for (int64_t begin = 0; begin < tile.rows; begin += few) {
                const int64_t first = tile.row + begin, pixels = std::min(few, tile.rows - begin);
                const word* d = gradient_.data() + begin * gradient_.pitch() + part.group * b_.channels_.group_words;
                for_each_slice(part.channels, b_.weight_.depth, 1, 1, b_.words_, [&](const Slice& slice) {
                    const gemm::Product product{gemm::single_tap(), pixels, slice.width, slice.length, d + slice.k,
                                                gradient_.pitch(), panel_of(part, slice), gemm::kPanel, b_.weight_.panel_pitch(),
                                                g_ + slice.n, kChunk, slice.adds(0)};
                    gemm::multiply(product, Order::kRows, b_.words_, prefetch_);
                });
                for_each_run(b_.tiling_, {tile.image, tile.images, first, pixels}, p_.in_height, p_.in_width, p_.gate != nullptr,
                             [&](int64_t image, int64_t pixel, int64_t count) {
                                 finish(image, pixel, count, g_ + (pixel - first) * kChunk, part);
                             });
            }
        }

        // Joined images with a stride (or a 1 x k kernel): the tile may begin and end inside images.
        void multiply_free_input(const Tile& tile, const Part& part) {
            int64_t row = tile.row;
            while (row < tile.row + tile.rows) {
                const int64_t image = row / p_.out_height, first = row % p_.out_height;
                const int64_t count = std::min(p_.out_height - first, tile.row + tile.rows - row);
                const int64_t begin = std::min(p_.in_height, first * p_.stride_h);
                const int64_t end = first + count == p_.out_height ? p_.in_height
                                                                   : std::min(p_.in_height, (first + count) * p_.stride_h);
                multiply_rows(0, image, {begin, end}, part, tile.row - image * p_.out_height);
                row += count;
            }
        }

        const word* panel_of(const Part& part, const Slice& slice) const {
            return b_.weight_.panel(part.group, (part.in_begin + slice.n) / gemm::kPanel) + slice.k * gemm::kPanel;
        }

        // dx rows of one image. Output row r is staged as row r - first_staged of the tile's image i.
        void multiply_rows(int64_t i, int64_t image, Range rows, const Part& part, int64_t first_staged) {
            const word* d = gradient_.data() + i * gradient_.image_pitch() - first_staged * gradient_.row_pitch() +
                            part.group * b_.channels_.group_words;
            if (b_.gradient_.crosses_rows()) return multiply_rows_together(d, image, rows, part);
            for_each_slice(part.channels, b_.weight_.depth, p_.kernel_h, p_.kernel_w, b_.words_, [&](const Slice& slice) {
                for (int64_t row = rows.begin; row < rows.end; row++) {
                    const int64_t first = first_kernel_row(row);
                    if (slice.ends_before(first)) continue;
                    float* g = g_ + (row - rows.begin) * p_.in_width * kChunk + slice.n;
                    for (int64_t phase = 0; phase < std::min(p_.stride_w, p_.in_width); phase++) {
                        taps_of(row, phase, slice.rows);
                        if (slice.adds(first) && list_.is_empty()) continue;
                        const gemm::Product product{
                            list_.taps(), ceil_div(p_.in_width - phase, p_.stride_w), slice.width, slice.length, d + slice.k,
                            gradient_.pitch(), panel_of(part, slice), gemm::kPanel, b_.weight_.panel_pitch(),
                            g + phase * kChunk, p_.stride_w * kChunk, slice.adds(first)};
                        gemm::multiply(product, Order::kRows, b_.words_, prefetch_);
                    }
                }
            });
            // Where no output pixel reads a row, its gradient is zero and there is nothing to add to dx; a join's mask remains to be applied.
            int64_t begin = rows.begin;
            for (int64_t row = rows.begin; row < rows.end && b_.a_.accumulate && !b_.a_.join.y; row++) {
                if (has_readers(row)) continue;
                finish_rows(image, rows.begin, {begin, row}, part);
                begin = row + 1;
            }
            finish_rows(image, rows.begin, {begin, rows.end}, part);
        }

        // Of a stride of one, on matrix tiles: all rows as one, through rows and columns of zeros around the output gradient.
        void multiply_rows_together(const word* d, int64_t image, Range rows, const Part& part) {
            const int64_t row_pixels = b_.gradient_.row_pixels;
            for_each_slice(part.channels, b_.weight_.depth, p_.kernel_h, p_.kernel_w, b_.words_, [&](const Slice& slice) {
                list_.clear();
                for (int64_t i = slice.rows.begin; i < slice.rows.end; i++) {
                    for (int64_t j = 0; j < p_.kernel_w; j++) {
                        const int64_t row = rows.begin + p_.padding_h - i * p_.dilation_h;
                        const int64_t column = gradient_.columns_before() + p_.padding_w - j * p_.dilation_w;
                        list_.add(row * gradient_.row_pitch() + column * gradient_.pitch(),
                                  (i * p_.kernel_w + j) * b_.weight_.tap_pitch());
                    }
                }
                const gemm::Product product{
                    list_.taps(), (rows.size() - 1) * row_pixels + p_.in_width, slice.width, slice.length, d + slice.k,
                    gradient_.pitch(), panel_of(part, slice), gemm::kPanel, b_.weight_.panel_pitch(), g_ + slice.n, kChunk,
                    slice.adds(0)};
                gemm::multiply(product, Order::kRows, b_.words_, prefetch_);
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
                              (i * p_.kernel_w + j) * b_.weight_.tap_pitch());
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
            T* dx = static_cast<T*>(b_.a_.dx) + pixel * b_.a_.dx_pitch + part.channel;
            const InputTransform t = transform_at(p_, image, part.channel);
            const bool accumulate = b_.a_.accumulate != 0;
            const auto factor = static_cast<float>(1 / b_.a_.gradient_factor);
            if (p_.gate) {
                gated_gradient_pixels(g, kChunk, x, p_.x_pitch, count, part.channels, t, factor, dx, b_.a_.dx_pitch, accumulate,
                                      sum_gate_);
                double* gate = shared_.gate + image * p_.in_channels + part.channel;
                for (int64_t c = 0; c < part.channels; c++) gate[c] += sum_gate_[c];
                for (int64_t c = 0; c < padded(kChunk); c++) sum_gate_[c] = 0;
                return;
            }
            if (b_.a_.join.y) {
                Sums& sums = *shared_.sums;
                join_gradient_pixels(g, kChunk, b_.a_.join, pixel, part.channel, count, part.channels, factor, dx, b_.a_.dx_pitch,
                                     accumulate, {sums[0] + part.channel, sums[1] + part.channel, sums[2] + part.channel});
                return;
            }
            float* sum_p = nullptr;
            float* sum_px = nullptr;
            if (shared_.sums) sum_p = (*shared_.sums)[0] + part.channel, sum_px = (*shared_.sums)[1] + part.channel;
            input_gradient_pixels(g, kChunk, x, p_.x_pitch, count, part.channels, t, factor, dx, b_.a_.dx_pitch, accumulate,
                                  sum_p, sum_px);
        }

        void request_gradient(const Tile& tile) {
            if (!b_.need_x_ || !w_.flat) return;
            const Join& join = b_.a_.join;
            const int64_t pixel = tile.row * p_.in_width, pixels = tile.rows * p_.in_width, bytes = p_.in_channels * sizeof(T);
            if (join.y) {
                prefetch_.add(static_cast<const T*>(join.y) + pixel * join.y_pitch, join.y_pitch * sizeof(T), pixels, bytes);
                prefetch_.add(static_cast<const T*>(join.r) + pixel * join.r_pitch, join.r_pitch * sizeof(T), pixels, bytes);
            }
            if (!b_.a_.accumulate) return;
            prefetch_.add(static_cast<T*>(b_.a_.dx) + pixel * b_.a_.dx_pitch, b_.a_.dx_pitch * sizeof(T), pixels, bytes);
        }

        void request(const Tile& tile) {
            for_each_run(b_.tiling_, tile, p_.out_height, p_.out_width, false, [&](int64_t, int64_t pixel, int64_t count) {
                const int64_t bytes = p_.out_channels * sizeof(T);
                prefetch_.add(static_cast<const T*>(b_.a_.dy) + pixel * b_.a_.dy_pitch, b_.a_.dy_pitch * sizeof(T), count, bytes);
                if (b_.a_.a) {
                    prefetch_.add(static_cast<const T*>(b_.a_.y) + pixel * b_.a_.y_pitch, b_.a_.y_pitch * sizeof(T), count, bytes);
                }
            });
            if ((w_.free_rows && !w_.flat) || (b_.a_.join.y && !b_.need_weight_)) return;   // nobody reads a join's sum then
            for (int64_t i = 0; i < tile.images; i++) {
                const Range rows = w_.free_rows ? Range{tile.row, tile.row + tile.rows} : input_rows(tile);
                const int64_t image_row = w_.free_rows ? 0 : (tile.image + i) * p_.in_height;
                prefetch_.add(static_cast<const T*>(p_.x) + (image_row + rows.begin) * p_.in_width * p_.x_pitch,
                              p_.x_pitch * sizeof(T), rows.size() * p_.in_width, p_.in_channels * sizeof(T));
            }
        }

        const Backward& b_;
        const Problem& p_;
        const Window& w_;
        Shared& shared_;
        Range tiles_;
        Scratch scratch_;
        GradientStage gradient_;
        std::unique_ptr<WeightProduct> weight_;
        gemm::Prefetch prefetch_;
        TapList list_;
        float* g_ = nullptr;
        float* sum_gate_ = nullptr;
    };

    const BackwardArguments& a_;
    const Problem& p_;
    Grouping grouping_;
    Words words_;
    StagedChannels channels_;   // of the output
    bool need_x_, need_weight_;
    Window window_;
    Tiling tiling_;
    GradientLayout gradient_;   // of tiles
    int64_t taps_, weight_row_, weight_size_;
    PackedWeight weight_;
};

}  // namespace

}  // namespace bnr::conv

namespace {

void run_backward(const bnr::conv::BackwardArguments& arguments) {
    const bnr::conv::Problem problem = bnr::conv::flattened(arguments.problem);
    if (problem.bfloat16) bnr::conv::Backward<bnr::bf16>(arguments, problem).run();
    else bnr::conv::Backward<float>(arguments, problem).run();
}

// The two products apart, each with the whole cache to itself.
void run_apart(const bnr::conv::BackwardArguments& arguments, bool whole_batch) {
    bnr::conv::BackwardArguments part = arguments;
    part.dx = nullptr;
    if (whole_batch) bnr::conv::weight_gradient_of_batch(part);
    else run_backward(part);
    part = arguments;
    part.weight_gradient = nullptr;
    part.bias_gradient = nullptr;
    if (part.dx) run_backward(part);
}

}  // namespace

BNR_EXPORT void bnr_conv_backward(const bnr::conv::BackwardArguments* arguments) {
    const bnr::conv::Problem& p = arguments->problem;
    const int64_t weight_bytes = p.out_channels * p.in_channels / p.groups * p.kernel_h * p.kernel_w * 4;
    const bool whole_batch = arguments->weight_gradient && bnr::conv::prefers_whole_batch(*arguments);
    if (whole_batch || (arguments->dx && arguments->weight_gradient && weight_bytes > 4 * bnr::conv::cache_size())) {
        run_apart(*arguments, whole_batch);
    } else {
        run_backward(*arguments);
    }
}
