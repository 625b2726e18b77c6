// The weight gradient from the whole batch at once. Tile by tile (conv_backward.cpp) every tile adds to all sums; where they
// are megabytes, adding them up takes longer than multiplying. Here the output gradient of all tiles is staged first, and
// then each thread goes through the batch once for each of its blocks of input channels, whose sums stay in cache. Every sum
// belongs to one thread: there is nothing to add up afterwards, and the result does not depend on the number of threads.
#include "conv_weight_gradient.h"

#include <memory>

#include "conv_pack.h"
#include "conv_weight_product.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

using gemm::Words;

constexpr int64_t kMostStaged = 32 << 20;   // bytes of output gradient: they should stay in the last-level cache

int64_t sums_bytes(const Problem& p, int64_t channels) { return p.out_channels * p.kernel_h * p.kernel_w * channels * 4; }

// Input channels a block: as many as leave their sums a third of the cache, with equal shares for the threads.
int64_t block_channels(const Problem& p) {
    const int64_t most = std::max<int64_t>(gemm::kPanel, cache_size() / 3 / sums_bytes(p, 1));
    const int64_t blocks = round_up(ceil_div(p.in_channels, most), p.threads);
    return std::max(gemm::kPanel, round_up(ceil_div(p.in_channels, blocks), gemm::kPanel));
}

template <class T>
class WeightGradient {
  public:
    WeightGradient(const BackwardArguments& arguments, const Problem& problem)
        : a_(arguments), p_(problem), grouping_(p_, block_channels(p_)), words_(words_for(p_, grouping_)), window_(p_, words_),
          tiling_(p_, window_, row_bytes(), ceil_div(p_.kernel_h - 1, p_.stride_h), cache_size() / 2, 512),
          layout_(p_, a_, window_, tiling_, words_) {}

    void run() {
        Scratch scratch;
        std::vector<std::unique_ptr<GradientStage>> staged;
        for (int64_t i = 0; i < tiling_.count; i++) staged.push_back(std::make_unique<GradientStage>(layout_, scratch));
        std::vector<std::unique_ptr<Sums>> bias;
        for (int64_t t = 0; a_.bias_gradient && t < p_.threads; t++) {
            bias.push_back(std::make_unique<Sums>(scratch, p_.out_channels, 1));
        }
        parallel(p_.threads, [&](int64_t t) {
            const Range mine = share(tiling_.count, 1, t, p_.threads);
            for (int64_t i = mine.begin; i < mine.end; i++) {
                staged[size_t(i)]->template fill<T>(tiling_.at(i));
                if (!a_.bias_gradient) continue;
                staged[size_t(i)]->template add_bias<T>(tiling_.at(i), (*bias[size_t(t)])[0]);
                bias[size_t(t)]->flush();
            }
        });
        for (size_t t = 1; t < bias.size(); t++) bias[0]->merge(*bias[t]);
        if (a_.bias_gradient) bias[0]->write(0, a_.bias_gradient);
        parallel(p_.threads, [&](int64_t t) {
            const auto blocks = int64_t(grouping_.blocks.size());
            multiply(share(blocks, 1, t, p_.threads), staged);
        });
    }

  private:
    int64_t row_bytes() const {
        const int64_t x = window_.columns * window_.row_stride * scratch_pitch(words_of(widest(), words_));
        const int64_t d = p_.out_width * scratch_pitch(words_of(p_.out_channels, words_));
        return (x * (words_ == Words::kFloat ? 1 : 3) + d) * 4;
    }

    int64_t widest() const {
        int64_t most = 0;
        for (const Block& block : grouping_.blocks) most = std::max(most, block.channels);
        return most;
    }

    void multiply(Range blocks, const std::vector<std::unique_ptr<GradientStage>>& staged) {
        if (blocks.size() <= 0) return;
        Scratch scratch;
        gemm::Prefetch prefetch;
        WeightProduct product(p_, window_, tiling_, words_, widest(), scratch);
        const int64_t taps = p_.kernel_h * p_.kernel_w, pitch = scratch_pitch(taps * widest());
        float* sums = scratch.take<float>(p_.out_channels * pitch + gemm::kPanel);
        for (int64_t b = blocks.begin; b < blocks.end; b++) {
            const Block& block = grouping_.blocks[size_t(b)];
            for (int64_t i = 0; i < tiling_.count; i++) {
                const Tile tile = tiling_.at(i);
                prefetch.clear();
                if (i + 1 < tiling_.count) request(tiling_.at(i + 1), block, prefetch);
                product.template run<T>(tile, block, grouping_.out, staged[size_t(i)]->own_rows(tile), {sums, pitch, block.in},
                                        i > 0, prefetch);
            }
            write_weight_block(a_, block, sums, pitch);
        }
    }

    // The block's input of the next tile.
    void request(const Tile& tile, const Block& block, gemm::Prefetch& prefetch) const {
        if (!window_.flat) return;
        prefetch.add(static_cast<const T*>(p_.x) + tile.row * p_.in_width * p_.x_pitch + block.channel, p_.x_pitch * sizeof(T),
                     tile.rows * p_.in_width, block.channels * sizeof(T));
    }

    const BackwardArguments& a_;
    const Problem& p_;
    Grouping grouping_;
    Words words_;
    Window window_;
    Tiling tiling_;
    GradientLayout layout_;
};

}  // namespace

bool prefers_whole_batch(const BackwardArguments& arguments) {
    const Problem& p = arguments.problem;
    const int64_t staged = p.batch * p.out_height * p.out_width * p.out_channels * 4;
    const int64_t sums = sums_bytes(p, p.in_channels);
    if (p.groups > 1 || staged > kMostStaged || p.in_channels < p.threads * gemm::kPanel) return false;
    if (!arguments.dx) return sums > cache_size() / 2;
    // Beside an input gradient this reads dy, y and x a second time. Tile by tile, about 128 pixels at a time, all sums are read
    // and written. A byte from memory costs about three and a half times one from the last-level cache (measured).
    const double again = double(2 * p.out_channels + p.in_channels) * (p.bfloat16 ? 2 : 4);
    return sums > cache_size() / 2 && double(sums) * 2 / 128 > 3.5 * again;
}

void weight_gradient_of_batch(const BackwardArguments& arguments) {
    const Problem problem = flattened(arguments.problem);
    if (problem.bfloat16) WeightGradient<bf16>(arguments, problem).run();
    else WeightGradient<float>(arguments, problem).run();
}

}  // namespace bnr::conv
