// The fused 3x3 convolution, backward, by Winograd's algorithm. The input gradient is a convolution of the output gradient, and goes
// through the activation's mask as it is made; the weight gradient sums 16 products over the tiles.
#include <memory>

#include "conv_pixels.h"
#include "library.h"
#include "statistics.h"
#include "winograd_rows.h"

namespace bnr::winograd {

namespace {


constexpr int64_t kBlockChannels = 64;          // input channels of the weight gradient that are staged together
constexpr int64_t kMostSums = 128 << 20;        // bytes of sums of the weight gradient

// A row of dY, of `out` pixels.
void stage_gradient(const BackwardArguments& a, const Plane& out, int64_t image, int64_t row, float* to, int64_t pitch) {
    const int64_t pixel = (image * out.height + row) * out.width;
    conv::output_gradient_pixels(static_cast<const float*>(a.dy) + pixel * a.dy_pitch, a.dy_pitch,
                                 static_cast<const float*>(a.y) + pixel * a.y_pitch, a.y_pitch, out.width, out.channels,
                                 {a.s, a.a, a.b, a.y_mean}, 1.0f, to, pitch);
}

// What a thread adds up over the input gradient.
struct InputSums {
    InputSums(Scratch& scratch, const BackwardArguments& a) {
        const Problem& p = a.problem;
        if (a.sum_p) sums = std::make_unique<Sums>(scratch, p.in_channels, a.join.y ? 3 : 2);
        if (p.gate) gate = scratch.zeros<double>(p.batch * p.in_channels), row_gate = scratch.zeros<float>(padded(p.in_channels));
    }

    void merge(const InputSums& o, const Problem& p) {
        if (sums) sums->merge(*o.sums);
        for (int64_t i = 0; gate && i < p.batch * p.in_channels; i++) gate[i] += o.gate[i];
    }

    void write(const BackwardArguments& a) const {
        if (sums) sums->write(0, a.sum_p), sums->write(1, a.sum_px);
        if (sums && a.sum_pr) sums->write(2, a.sum_pr);
        for (int64_t i = 0; gate && i < a.problem.batch * a.problem.in_channels; i++) a.gate_gradient[i] = static_cast<float>(gate[i]);
    }

    std::unique_ptr<Sums> sums;
    double* gate = nullptr;
    float* row_gate = nullptr;
};

// A row of the gradient at the convolution's real input, to dx.
void finish_input_row(const BackwardArguments& a, int64_t image, int64_t row, const float* from, int64_t pitch, InputSums& to) {
    const Problem& p = a.problem;
    const int64_t pixel = (image * p.in_height + row) * p.in_width, channels = p.in_channels;
    const float* x = static_cast<const float*>(p.x) + pixel * p.x_pitch;
    float* dx = static_cast<float*>(a.dx) + pixel * a.dx_pitch;
    const conv::InputTransform transform = conv::transform_at(p, image, 0);
    const bool accumulate = a.accumulate != 0;
    if (a.join.y) {
        Sums& sums = *to.sums;
        join_gradient_pixels(from, pitch, a.join, pixel, 0, p.in_width, channels, 1.0f, dx, a.dx_pitch, accumulate,
                                   {sums[0], sums[1], sums[2]});
        return;
    }
    if (!p.gate) {
        float* sum_p = to.sums ? (*to.sums)[0] : nullptr;
        float* sum_px = to.sums ? (*to.sums)[1] : nullptr;
        conv::input_gradient_pixels(from, pitch, x, p.x_pitch, p.in_width, channels, transform, 1.0f, dx, a.dx_pitch, accumulate,
                                    sum_p, sum_px);
        return;
    }
    conv::gated_gradient_pixels(from, pitch, x, p.x_pitch, p.in_width, channels, transform, 1.0f, dx, a.dx_pitch, accumulate,
                                to.row_gate);
    for (int64_t c = 0; c < channels; c++) to.gate[image * channels + c] += to.row_gate[c], to.row_gate[c] = 0;
}

void input_gradient(const BackwardArguments& a) {
    const Problem& p = a.problem;
    const Plane in{p.in_height, p.in_width, p.in_channels}, out{p.out_height, p.out_width, p.out_channels};
    const TileRows rows(in, p.batch);
    Scratch scratch;
    const conv::Grouping grouping(p, INT64_MAX);
    const conv::PackedWeight weight = transform_weight(p, grouping, true, scratch);
    const int64_t threads = std::min(p.threads, rows.count);
    std::vector<InputSums> sums;
    for (int64_t t = 0; t < threads; t++) sums.emplace_back(scratch, a);
    parallel(threads, [&](int64_t t) {
        Scratch own;
        InputSums& mine = sums[size_t(t)];
        Convolution(own, out, in, rows, 2 - p.padding_h, 2 - p.padding_w, weight, grouping.groups).run(
            share(rows.count, 1, t, threads),
            [&](int64_t image, int64_t row, float* to, int64_t pitch) { stage_gradient(a, out, image, row, to, pitch); },
            [&](int64_t image, int64_t row, const float* from, int64_t pitch) { finish_input_row(a, image, row, from, pitch, mine); },
            [&](int64_t) {
                if (mine.sums) mine.sums->flush();
            },
            [&](Range next, gemm::Prefetch& prefetch) {
                if (a.join.y) request(a.join.y, a.join.y_pitch, p.batch, in, rows, next, prefetch);
                else request(p.x, p.x_pitch, p.batch, in, rows, next, prefetch);
            });
    });
    for (int64_t t = 1; t < threads; t++) sums[0].merge(sums[size_t(t)], p);
    sums[0].write(a);
}

// A thread's part of the weight gradient, some rows of tiles and some blocks of input channels: adds to
// sums[(component * C_out + n) * row_pitch + c], c within the group.
class WeightGradient {
  public:
    WeightGradient(Scratch& scratch, const BackwardArguments& a, const conv::Grouping& grouping, const TileRows& rows, float* sums,
                   int64_t row_pitch, float* bias)
        : a_(a), p_(a.problem), in_{p_.in_height, p_.in_width, p_.in_channels}, out_{p_.out_height, p_.out_width, p_.out_channels},
          grouping_(grouping), rows_(rows), together_(chunk()),
          staged_(scratch, in_, p_.padding_h, p_.padding_w, rows.tiles, widest()),
          input_(scratch, together_ * rows.tiles, widest()), gradient_(scratch, together_ * rows.tiles, out_.channels),
          pitch_(conv::scratch_pitch(out_.channels)), dy_(scratch.zeros<float>(4 * rows.tiles * pitch_)), sums_(sums),
          row_pitch_(row_pitch), bias_(bias) {}

    template <class Flush>
    void run(Range mine, Range blocks, Flush&& flush) {
        for (int64_t begin = mine.begin; begin < mine.end; begin += together_) {
            const Range chunk{begin, std::min(mine.end, begin + together_)};
            for (int64_t i = chunk.begin; i < chunk.end; i++) stage_gradient_of(i, (i - begin) * rows_.tiles);
            flush();
            if (!a_.weight_gradient) continue;
            prefetch_.clear();
            for (int64_t b = blocks.begin; b < blocks.end; b++) {
                const conv::Block& block = grouping_.blocks[size_t(b)];
                stage_input(chunk, block);
                if (b + 1 == blocks.end && chunk.end < mine.end) {
                    const Range next{chunk.end, std::min(mine.end, chunk.end + together_)};
                    request(a_.dy, a_.dy_pitch, p_.batch, out_, rows_, next, prefetch_);
                    if (a_.a) request(a_.y, a_.y_pitch, p_.batch, out_, rows_, next, prefetch_);
                }
                multiply(chunk.size() * rows_.tiles, block, begin != mine.begin);
            }
        }
    }

  private:
    int64_t widest() const {
        int64_t most = 0;
        for (const conv::Block& block : grouping_.blocks) most = std::max(most, block.channels);
        return most;
    }

    int64_t chunk() const {
        const int64_t floats = kComponents * rows_.tiles * (conv::scratch_pitch(widest()) + conv::scratch_pitch(out_.channels));
        return rows_together(rows_, floats, 56, conv::cache_size() * 2 / 3);
    }

    void stage_gradient_of(int64_t index, int64_t pixel) {
        const int64_t image = index / rows_.per_image, row = 2 * (index % rows_.per_image);
        const float* rows[2] = {dy_, dy_ + 2 * rows_.tiles * pitch_};
        for (int64_t q = 0; q < 2; q++) {
            float* to = dy_ + q * 2 * rows_.tiles * pitch_;
            if (row + q >= out_.height) {
                std::memset(static_cast<void*>(to), 0, size_t(2 * rows_.tiles * pitch_) * sizeof(float));
                continue;
            }
            stage_gradient(a_, out_, image, row + q, to, pitch_);
            if (!bias_) continue;
            add_rows(to, pitch_, out_.width, out_.channels, bias_);
        }
        transform_gradient(rows, pitch_, rows_.tiles, out_.channels, gradient_, pixel);
    }

    void stage_input(Range chunk, const conv::Block& block) {
        staged_.forget();
        for (int64_t i = chunk.begin; i < chunk.end; i++) {
            const int64_t image = i / rows_.per_image;
            staged_.move_to(image, i % rows_.per_image, [&](int64_t row, float* to) {
                const int64_t pixel = (image * in_.height + row) * in_.width;
                conv::transform_pixels(static_cast<const float*>(p_.x) + pixel * p_.x_pitch + block.channel, p_.x_pitch, in_.width,
                                       block.channels, conv::transform_at(p_, image, block.channel), to, staged_.pitch());
            });
            transform_input(staged_.rows(), staged_.pitch(), rows_.tiles, block.channels, input_, (i - chunk.begin) * rows_.tiles);
        }
    }

    void multiply(int64_t pixels, const conv::Block& block, bool accumulate) {
        for (int64_t index = 0; index < kComponents * block.groups; index++) {
            const int64_t i = index / block.groups, g = index % block.groups, n = (block.group + g) * grouping_.out;
            const gemm::Product product{
                gemm::single_tap(), grouping_.out, block.in, pixels, reinterpret_cast<const gemm::word*>(gradient_.of(i) + n),
                gradient_.pitch, reinterpret_cast<const gemm::word*>(input_.of(i) + g * block.in), input_.pitch, gemm::kPanel,
                sums_ + (i * out_.channels + n) * row_pitch_ + block.in_begin, row_pitch_, accumulate};
            gemm::multiply(product, gemm::Order::kColumns, gemm::Words::kFloat, prefetch_);
        }
    }

    const BackwardArguments& a_;
    const Problem& p_;
    const Plane in_, out_;
    const conv::Grouping& grouping_;
    const TileRows rows_;
    int64_t together_;
    StagedRows staged_;
    Components input_, gradient_;
    int64_t pitch_;
    float *dy_, *sums_;
    int64_t row_pitch_;
    float* bias_;
    gemm::Prefetch prefetch_;
};

// The weight's gradient and the bias's, those that are wanted.
void weight_gradient(const BackwardArguments& a) {
    const Problem& p = a.problem;
    const TileRows rows({p.out_height, p.out_width, p.out_channels}, p.batch);
    const conv::Grouping grouping(p, kBlockChannels);
    const int64_t row_pitch = conv::scratch_pitch(grouping.in), size = kComponents * p.out_channels * row_pitch;
    const auto blocks = int64_t(grouping.blocks.size());
    // Each part of the rows has sums of its own; where they would be too much memory, several threads share a part's channels.
    const int64_t parts = std::clamp<int64_t>(kMostSums / (size * 4), 1, std::min(p.threads, rows.count));
    const int64_t sharers = std::min(p.threads / parts, blocks);
    Scratch scratch;
    std::vector<float*> sums;
    std::vector<std::unique_ptr<Sums>> bias;
    for (int64_t part = 0; part < parts; part++) {
        sums.push_back(scratch.take<float>(size));
        if (a.bias_gradient) bias.push_back(std::make_unique<Sums>(scratch, p.out_channels, 1));
    }
    parallel(parts * sharers, [&](int64_t t) {
        const size_t part = size_t(t / sharers);
        Scratch own;
        Sums* b = a.bias_gradient && t % sharers == 0 ? bias[part].get() : nullptr;
        WeightGradient(own, a, grouping, rows, sums[part], row_pitch, b ? (*b)[0] : nullptr)
            .run(share(rows.count, 1, t / sharers, parts), share(blocks, 1, t % sharers, sharers), [&] {
                if (b) b->flush();
            });
    });
    for (size_t t = 1; t < bias.size(); t++) bias[0]->merge(*bias[t]);
    if (a.bias_gradient) bias[0]->write(0, a.bias_gradient);
    if (!a.weight_gradient) return;
    const int64_t pitch = conv::scratch_pitch(9 * grouping.in);
    float* taps = scratch.take<float>(p.out_channels * pitch);
    transform_weight_gradient(sums, p.out_channels, grouping.in, row_pitch, taps, pitch, p.threads);
    conv::write_weight_gradient(a, grouping, {taps}, pitch, false);
}

}  // namespace

}  // namespace bnr::winograd

BNR_EXPORT void bnr_winograd_backward(const bnr::BackwardArguments* arguments) {
    if (arguments->weight_gradient || arguments->bias_gradient) bnr::winograd::weight_gradient(*arguments);
    if (arguments->dx) bnr::winograd::input_gradient(*arguments);
}
