// The fused convolution, forward: each tile of the input is transformed once into scratch, multiplied by the packed weight,
// and the statistics are taken of the output tile while it is in cache.
#include <memory>

#include "conv_pack.h"
#include "conv_stage.h"
#include "library.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

using gemm::Order;
using gemm::Words;
using gemm::word;

// The input itself serves as the staged input: nothing to apply, whole words, and a pitch that spreads over the cache's sets.
bool reads_input_directly(const Problem& p, const Window& w, const StagedChannels& channels) {
    const Words words = channels.words;
    if (!w.flat || !transform_at(p, 0, 0).is_identity()) return false;
    if (words == Words::kBFloat16Tile) {
        const bool aligned = p.x_pitch % 32 == 0 && reinterpret_cast<uintptr_t>(p.x) % 64 == 0;
        return aligned && channels.width % (2 * gemm::kTileWords) == 0 && p.x_pitch % 2048 != 0;
    }
    if (words == Words::kFloat) return !p.bfloat16() && p.x_pitch % 1024 != 0;
    const bool whole = p.in_channels % 2 == 0 && p.x_pitch % 2 == 0 && reinterpret_cast<uintptr_t>(p.x) % 4 == 0;
    return whole && p.x_pitch % 2048 != 0;
}

template <class T>
class Forward {
  public:
    Forward(const ForwardArguments& arguments, const Problem& problem)
        : a_(arguments), p_(problem), grouping_(p_, INT64_MAX), words_(words_for(p_, grouping_)),
          channels_(grouping_.groups, grouping_.in, words_), window_(p_, words_), direct_(reads_input_directly(p_, window_, channels_)),
          row_pixels_(window_.pixels_in_row(p_, words_)),
          tiling_(p_, window_, row_bytes(), ceil_div(p_.kernel_h - 1, p_.stride_h), cache_size() * 2 / 5, 512) {}

    void run() {
        Scratch scratch;
        const int64_t taps = p_.kernel_h * p_.kernel_w, depth = depth_of(grouping_.in, words_);
        weight_ = pack_weight(p_, grouping_, false, words_,
                              scratch.take<word>(PackedWeight::size(grouping_.groups, taps, depth, grouping_.out)));
        const int64_t threads = std::min(p_.threads, tiling_.count);
        std::vector<std::unique_ptr<Moments>> moments;
        for (int64_t t = 0; a_.y_mean && t < threads; t++) {
            moments.push_back(std::make_unique<Moments>(scratch, p_.out_channels));
        }
        parallel(threads, [&](int64_t t) {
            run_share(share(tiling_.count, 1, t, threads), a_.y_mean ? moments[t].get() : nullptr);
        });
        if (!a_.y_mean) return;
        for (int64_t t = 1; t < threads; t++) moments[0]->merge(*moments[t]);
        moments[0]->write(a_.y_mean, a_.y_var);
    }

  private:
    int64_t row_bytes() const {
        const int64_t staged = window_.columns * window_.row_stride * scratch_pitch(channels_.size);
        const int64_t made = row_pixels_ * p_.out_channels * (p_.bfloat16() ? 6 : 4) / 4;
        return (staged + made / 2) * 4;
    }

    void run_share(Range mine, Moments* moments) {
        Scratch scratch;
        gemm::Prefetch prefetch;
        TapList list;
        std::unique_ptr<InputStage> stage;
        if (!direct_) stage = std::make_unique<InputStage>(p_, window_, tiling_, channels_, scratch);
        const int64_t tile_pixels = tiling_.tile_images * tiling_.tile_rows * row_pixels_;
        const int64_t sums_pitch = scratch_pitch(p_.out_channels);
        float* sums = p_.bfloat16() ? scratch.take<float>(tile_pixels * sums_pitch) : nullptr;
        for (int64_t index = mine.begin; index < mine.end; index++) {
            const Tile tile = tiling_.at(index);
            if (a_.join.y) form_sum(tile);
            if (stage) stage->template fill<T>(tile, 0, p_.in_channels);
            prefetch.clear();
            if (index + 1 < mine.end) request(tiling_.at(index + 1), prefetch);
            const Products c = products_of(tile, sums, sums_pitch);
            if (stage && !window_.flat) {
                multiply(tile, *stage, c, prefetch, list);
            } else {
                const T* x = static_cast<const T*>(p_.x) + tile.row * p_.out_width * p_.x_pitch;
                multiply_flat(stage ? stage->data() : reinterpret_cast<const word*>(x),
                              stage ? stage->pitch() : words_of(p_.x_pitch, words_), tile.rows * p_.out_width, c, prefetch);
            }
            int64_t image = 0;
            for_each_run(tiling_, tile, p_.out_height, p_.out_width, false, [&](int64_t, int64_t pixel, int64_t count) {
                finish(c.data + image++ * c.image_pitch, c.pitch, count, static_cast<T*>(a_.y) + pixel * a_.y_pitch, moments);
            });
        }
    }

    // Where a tile's products are: in scratch for bfloat16, else in y itself.
    struct Products {
        float* data;
        int64_t pitch, image_pitch;
    };

    Products products_of(const Tile& tile, float* sums, int64_t sums_pitch) const {
        if (sums) return {sums, sums_pitch, tile.rows * row_pixels_ * sums_pitch};
        const int64_t row = tile.image * p_.out_height + tile.row;
        return {static_cast<float*>(a_.y) + row * p_.out_width * a_.y_pitch, a_.y_pitch, p_.out_height * p_.out_width * a_.y_pitch};
    }

    // The tile's part of x, which the product then reads while it is in the cache.
    void form_sum(const Tile& tile) {
        T* x = static_cast<T*>(const_cast<void*>(p_.x));
        for_each_run(tiling_, tile, p_.in_height, p_.in_width, false, [&](int64_t, int64_t pixel, int64_t count) {
            join_pixels(a_.join, pixel, count, p_.in_channels, x + pixel * p_.x_pitch, p_.x_pitch);
        });
    }

    // Sums in `c`, which may be y itself, to y; and its statistics.
    void finish(const float* c, int64_t ldc, int64_t count, T* y, Moments* moments) {
        const bool stores = static_cast<const void*>(c) != y || a_.bias;
        const bool first = moments && moments->is_empty();   // its mean is the shift
        const int64_t width = row_pixels_ == p_.out_width ? count : p_.out_width;   // pixels between gaps
        for (int64_t i = 0; stores && i < count; i += width, c += row_pixels_ * ldc) {
            T* to = y + i * a_.y_pitch;
            if (moments && !first) {
                finish_output_pixels(c, ldc, width, p_.out_channels, a_.bias, to, a_.y_pitch, moments->shift, moments->sum,
                                     moments->square);
            } else {
                finish_output_pixels(c, ldc, width, p_.out_channels, a_.bias, to, a_.y_pitch);
            }
        }
        if (!moments) return;
        if (first) moments->start(y, a_.y_pitch, count);
        if (first || !stores) {
            add_moments(y, a_.y_pitch, count, p_.out_channels, moments->shift, moments->sum, moments->square);
        }
        moments->flush(count);
    }

    void multiply(const Tile& tile, const InputStage& stage, const Products& c, gemm::Prefetch& prefetch, TapList& list) {
        const int64_t depth = weight_.depth * (window_.joined ? p_.kernel_w : 1);
        const int64_t columns = window_.joined ? 1 : p_.kernel_w;
        for (int64_t g = 0; g < grouping_.groups; g++) {
            for_each_slice(grouping_.out, depth, p_.kernel_h, columns, words_, [&](const Slice& slice) {
                for (int64_t i = 0; i < tile.images; i++) {   // inside, so that the weights are read once for all of them
                    const word* a = stage.data() + i * stage.image_pitch() + g * channels_.group_words + slice.k;
                    float* to = c.data + i * c.image_pitch + g * grouping_.out + slice.n;
                    const word* b = weight_.panel(g, slice.n / gemm::kPanel) + slice.k * gemm::kPanel;
                    if (crosses_rows()) multiply_across_rows(tile, stage, slice, a, b, to, c.pitch, prefetch, list);
                    else multiply_rows(tile, stage, slice, a, b, to, c.pitch, prefetch, list);
                }
            });
        }
    }

    // A slice's product for each row of one image (or of the joined images).
    void multiply_rows(const Tile& tile, const InputStage& stage, const Slice& slice, const word* a, const word* b, float* c,
                       int64_t ldc, gemm::Prefetch& prefetch, TapList& list) {
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t first = first_kernel_row(tile.row + r);
            if (slice.ends_before(first)) continue;
            taps_of(tile.row + r, slice.rows, stage, list);
            if (slice.adds(first) && list.is_empty()) continue;
            const gemm::Product product{
                list.taps(), p_.out_width, slice.width, slice.length, a + r * window_.row_stride * stage.row_pitch(),
                window_.column_stride * stage.pitch(), b, gemm::kPanel, weight_.panel_pitch(), c + r * p_.out_width * ldc, ldc,
                slice.adds(first)};
            gemm::multiply(product, Order::kRows, words_, prefetch);
        }
    }

    // The same for all rows at once. Padding is staged as zeros, so that each of them reads through all taps.
    void multiply_across_rows(const Tile& tile, const InputStage& stage, const Slice& slice, const word* a, const word* b, float* c,
                              int64_t ldc, gemm::Prefetch& prefetch, TapList& list) {
        list.clear();
        for (int64_t i = slice.rows.begin; i < slice.rows.end; i++) {
            for (int64_t j = 0; j < p_.kernel_w; j++) {
                list.add(i * p_.dilation_h * stage.row_pitch() + j * p_.dilation_w * stage.pitch(),
                         (i * p_.kernel_w + j) * weight_.tap_pitch());
            }
        }
        const gemm::Product product{
            list.taps(), (tile.rows - 1) * row_pixels_ + p_.out_width, slice.width, slice.length, a,
            window_.column_stride * stage.pitch(), b, gemm::kPanel, weight_.panel_pitch(), c, ldc, slice.adds(0)};
        gemm::multiply(product, Order::kRows, words_, prefetch);
    }

    bool crosses_rows() const {
        return words_ == Words::kBFloat16Tile && row_pixels_ * window_.column_stride == window_.row_stride * window_.columns;
    }

    void multiply_flat(const word* a, int64_t lda, int64_t pixels, const Products& c, gemm::Prefetch& prefetch) {
        for (int64_t g = 0; g < grouping_.groups; g++) {
            const word* group = a + g * channels_.group_words;
            for_each_slice(grouping_.out, weight_.depth, 1, 1, words_, [&](const Slice& slice) {
                const gemm::Product product{gemm::single_tap(), pixels, slice.width, slice.length, group + slice.k, lda,
                                            weight_.panel(g, slice.n / gemm::kPanel) + slice.k * gemm::kPanel, gemm::kPanel,
                                            weight_.panel_pitch(), c.data + g * grouping_.out + slice.n, c.pitch, slice.adds(0)};
                gemm::multiply(product, Order::kRows, words_, prefetch);
            });
        }
    }

    // The first kernel row that does not fall into the padding; 0 where all do, so that the first slice writes zeros.
    int64_t first_kernel_row(int64_t row) const {
        for (int64_t i = 0; i < p_.kernel_h; i++) {
            if (reads_input(p_, window_, row, i)) return i;
        }
        return 0;
    }

    // The taps of an output row, leaving out kernel rows that fall into the padding.
    void taps_of(int64_t row, Range kernel_rows, const InputStage& stage, TapList& list) const {
        list.clear();
        for (int64_t i = kernel_rows.begin; i < kernel_rows.end; i++) {
            if (!reads_input(p_, window_, row, i)) continue;
            const int64_t offset = i * p_.dilation_h * stage.row_pitch();
            for (int64_t j = 0; j < (window_.joined ? 1 : p_.kernel_w); j++) {
                list.add(offset + j * p_.dilation_w * stage.pitch(), (i * p_.kernel_w + j) * weight_.tap_pitch());
            }
        }
    }

    void request(const Tile& tile, gemm::Prefetch& prefetch) const {
        const int64_t size = sizeof(T);
        for (int64_t i = 0; i < tile.images; i++) {
            int64_t begin = tile.row, end = tile.row + tile.rows;   // rows of the batch
            if (!window_.free_rows) {
                begin = std::max<int64_t>(0, Window::input_row(p_, tile.row, 0));
                end = std::min(p_.in_height, Window::input_row(p_, tile.row + tile.rows - 1, p_.kernel_h - 1) + 1);
                begin += (tile.image + i) * p_.in_height, end += (tile.image + i) * p_.in_height;
            } else if (!window_.flat) {
                return;
            }
            const int64_t pixel = begin * p_.in_width, pixels = (end - begin) * p_.in_width, bytes = p_.in_channels * size;
            const Join& join = a_.join;
            if (join.y) {
                prefetch.add(static_cast<const T*>(join.y) + pixel * join.y_pitch, join.y_pitch * size, pixels, bytes);
                prefetch.add(static_cast<const T*>(join.r) + pixel * join.r_pitch, join.r_pitch * size, pixels, bytes);
            } else {
                prefetch.add(static_cast<const T*>(p_.x) + pixel * p_.x_pitch, p_.x_pitch * size, pixels, bytes);
            }
        }
    }

    const ForwardArguments& a_;
    const Problem& p_;
    Grouping grouping_;
    Words words_;
    StagedChannels channels_;
    Window window_;
    bool direct_;
    int64_t row_pixels_;
    Tiling tiling_;
    PackedWeight weight_;
};

}  // namespace

}  // namespace bnr::conv

BNR_EXPORT void bnr_conv_forward(const bnr::ForwardArguments* arguments) {
    const bnr::Problem problem = bnr::conv::flattened(arguments->problem);
    if (problem.bfloat16()) bnr::conv::Forward<bnr::bf16>(*arguments, problem).run();
    else bnr::conv::Forward<float>(*arguments, problem).run();
}
