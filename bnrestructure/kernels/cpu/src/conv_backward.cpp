// The fused convolution, backward: each tile's output gradient is staged once for both products. The weight gradient sums
// over pixels into accumulators of each thread; the input gradient goes through the activation's mask, where the per-channel
// sums are taken, straight to dx.
#include <memory>

#include "conv_gradient_stage.h"
#include "conv_input_product.h"
#include "conv_pack.h"
#include "conv_stage.h"
#include "conv_weight_gradient.h"
#include "conv_weight_product.h"
#include "library.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

using gemm::Words;
using gemm::word;

constexpr int64_t kBlockChannels = 512;   // input channels staged together

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
        const int64_t g = need_x_ ? p_.in_width * p_.stride_h * (InputProduct<T>::kChunk + (tiles ? p_.in_channels : 0)) : 0;   // and x and dx
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
                input_ = std::make_unique<InputProduct<T>>(b.grouping_, b.gradient_, gradient_, b.weight_, shared.sums.get(),
                                                           shared.gate, scratch_);
            }
        }

        void run() {
            for (int64_t index = tiles_.begin; index < tiles_.end; index++) {
                const Tile tile = b_.tiling_.at(index);
                gradient_.template fill<T>(tile);
                if (shared_.bias) gradient_.template add_bias<T>(tile, (*shared_.bias)[0]), shared_.bias->flush();
                prefetch_.clear();
                if (input_) input_->request(tile, prefetch_);
                if (index + 1 < tiles_.end) request(b_.tiling_.at(index + 1));
                for (const Block& block : b_.grouping_.blocks) {
                    if (b_.need_weight_) {
                        const WeightSums sums{shared_.weight + block.in_begin, b_.weight_row_, b_.grouping_.in};
                        weight_->template run<T>(tile, block, b_.grouping_.out, gradient_.own_rows(tile), sums,
                                                 index != tiles_.begin, prefetch_);
                    }
                    if (input_) input_->run(tile, block, prefetch_);
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
                const Range rows = w_.free_rows ? Range{tile.row, tile.row + tile.rows} : input_rows(p_, tile);
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
        std::unique_ptr<InputProduct<T>> input_;
        gemm::Prefetch prefetch_;
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

void run_backward(const bnr::BackwardArguments& arguments) {
    const bnr::Problem problem = bnr::conv::flattened(arguments.problem);
    if (problem.bfloat16()) bnr::conv::Backward<bnr::bf16>(arguments, problem).run();
    else bnr::conv::Backward<float>(arguments, problem).run();
}

// The two products apart, each with the whole cache to itself.
void run_apart(const bnr::BackwardArguments& arguments, bool whole_batch) {
    bnr::BackwardArguments part = arguments;
    part.dx = nullptr;
    if (whole_batch) bnr::conv::weight_gradient_of_batch(part);
    else run_backward(part);
    part = arguments;
    part.weight_gradient = nullptr;
    part.bias_gradient = nullptr;
    if (part.dx) run_backward(part);
}

}  // namespace

BNR_EXPORT void bnr_conv_backward(const bnr::BackwardArguments* arguments) {
    const bnr::Problem& p = arguments->problem;
    const int64_t weight_bytes = p.out_channels * p.in_channels / p.groups * p.kernel_h * p.kernel_w * 4;
    const bool whole_batch = arguments->weight_gradient && bnr::conv::prefers_whole_batch(*arguments);
    if (whole_batch || (arguments->dx && arguments->weight_gradient && weight_bytes > 4 * bnr::conv::cache_size())) {
        run_apart(*arguments, whole_batch);
    } else {
        run_backward(*arguments);
    }
}
