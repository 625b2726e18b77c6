// The weight gradient from many tiles at once. Tile by tile (conv_backward.cpp) every tile adds to all sums; where they are
// megabytes, adding them up takes longer than multiplying. Here the output gradient of as many tiles as the last-level cache
// holds, often the whole batch's, is staged first, and then each thread goes through them once for each of its blocks of input
// channels, whose sums stay in cache meanwhile. Every sum belongs to one thread: there is nothing to add up afterwards.
#include "conv_weight_gradient.h"

#include <memory>

#include "conv_pack.h"
#include "conv_weight_product.h"
#include "parallel.h"
#include "statistics.h"

namespace bnr::conv {

namespace {

using gemm::Words;

constexpr int64_t kMostStaged = 24 << 20;   // bytes of output gradient: they should stay in the last-level cache

int64_t sums_bytes(const Problem& p, int64_t channels) { return p.out_channels * p.kernel_h * p.kernel_w * channels * 4; }

int64_t staged_bytes(const Problem& p) { return p.batch * p.out_height * p.out_width * p.out_channels * 4; }

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
        : a_(arguments), p_(problem), grouping_(p_, block_channels(p_)), words_(words_for(p_, grouping_)), window_(p_, words_, true),
          tiling_(p_, window_, row_bytes(), ceil_div(p_.kernel_h - 1, p_.stride_h), cache_size() / 2, 512),
          layout_(p_, a_, window_, tiling_, StagedChannels(1, p_.out_channels, words_)), sums_pitch_(scratch_pitch(p_.kernel_h * p_.kernel_w * widest())) {}

    void run() {
        Scratch scratch;
        const int64_t parts = ceil_div(staged_bytes(p_), kMostStaged);
        const int64_t together = std::min(tiling_.count, round_up(ceil_div(tiling_.count, parts), p_.threads));
        std::vector<std::unique_ptr<GradientStage>> staged;
        for (int64_t i = 0; i < together; i++) staged.push_back(std::make_unique<GradientStage>(layout_, scratch));
        const int64_t size = p_.out_channels * sums_pitch_ + gemm::kPanel;
        std::vector<float*> sums;   // of each block, from one part to the next
        for (int64_t b = 0; together < tiling_.count && b < blocks(); b++) sums.push_back(scratch.take<float>(size));
        std::vector<std::unique_ptr<Sums>> bias;
        for (int64_t t = 0; a_.bias_gradient && t < p_.threads; t++) {
            bias.push_back(std::make_unique<Sums>(scratch, p_.out_channels, 1));
        }
        for (int64_t begin = 0; begin < tiling_.count; begin += together) {
            const Range tiles{begin, std::min(tiling_.count, begin + together)};
            parallel(p_.threads, [&](int64_t t) {
                const Range mine = share(tiles.size(), 1, t, p_.threads);
                for (int64_t i = mine.begin; i < mine.end; i++) {
                    const Tile tile = tiling_.at(tiles.begin + i);
                    staged[size_t(i)]->template fill<T>(tile);
                    if (!a_.bias_gradient) continue;
                    staged[size_t(i)]->template add_bias<T>(tile, (*bias[size_t(t)])[0]);
                    bias[size_t(t)]->flush();
                }
            });
            parallel(p_.threads, [&](int64_t t) {
                const Range mine = share(blocks(), 1, t, p_.threads);
                if (mine.size() == 0) return;
                Scratch own;
                WeightProduct product(p_, window_, tiling_, words_, widest(), own);
                float* const reused = sums.empty() ? own.take<float>(size) : nullptr;
                for (int64_t b = mine.begin; b < mine.end; b++) {
                    multiply(product, grouping_.blocks[size_t(b)], tiles, staged, reused ? reused : sums[size_t(b)]);
                }
            });
        }
        for (size_t t = 1; t < bias.size(); t++) bias[0]->merge(*bias[t]);
        if (a_.bias_gradient) bias[0]->write(0, a_.bias_gradient);
    }

  private:
    int64_t blocks() const { return int64_t(grouping_.blocks.size()); }

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

    // Adds the products of these tiles, which are staged in this order, to the sums of a block; the last ones finish it.
    void multiply(WeightProduct& product, const Block& block, Range tiles,
                  const std::vector<std::unique_ptr<GradientStage>>& staged, float* sums) {
        gemm::Prefetch prefetch;
        for (int64_t i = tiles.begin; i < tiles.end; i++) {
            const Tile tile = tiling_.at(i);
            prefetch.clear();
            if (i + 1 < tiles.end) request(tiling_.at(i + 1), block, prefetch);
            product.template run<T>(tile, block, grouping_.out, staged[size_t(i - tiles.begin)]->own_rows(tile),
                                    {sums, sums_pitch_, block.in}, i > 0, prefetch);
        }
        if (tiles.end == tiling_.count) write_weight_block(a_, block, sums, sums_pitch_);
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
    int64_t sums_pitch_;   // from one output channel's to the next
};

}  // namespace

bool prefers_whole_batch(const BackwardArguments& arguments) {
    const Problem& p = arguments.problem;
    const int64_t sums = sums_bytes(p, p.in_channels);
    if (p.groups > 1 || p.in_channels < p.threads * gemm::kPanel) return false;
    if (!arguments.dx) return sums > cache_size() / 2;
    // Beside an input gradient this reads dy, y and x a second time. Tile by tile, about 128 pixels at a time, all sums are read
    // and written. A byte from memory costs about three and a half times one from the last-level cache (measured).
    // Where not all of the batch can be staged at once, its products wait for main memory: measured, that takes four times as
    // much to be worth it.
    const double again = double(2 * p.out_channels + p.in_channels) * (p.bfloat16() ? 2 : 4);
    const double least = staged_bytes(p) > kMostStaged ? 4.0 : 1.0;
    return sums > cache_size() / 2 && double(sums) * 2 / 128 > least * 3.5 * again;
}

void weight_gradient_of_batch(const BackwardArguments& arguments) {
    const Problem problem = flattened(arguments.problem);
    if (problem.bfloat16()) WeightGradient<bf16>(arguments, problem).run();
    else WeightGradient<float>(arguments, problem).run();
}

}  // namespace bnr::conv
