#include "conv_pack.h"

#include <type_traits>

#include "pack_transpose.h"
#include "parallel.h"

namespace bnr::conv {

namespace {

// Reads the weight [C_out, C_in / groups, kh, kw] as the merged groups see it: (group, output, input within the group).
template <class T>
struct WeightView {
    const T* data;
    const int64_t* strides;
    int64_t merged, in_each, out_each;

    // Where input channel 0 of the row of this output channel would be, and which inputs exist.
    const T* row(int64_t group_out, int64_t out_channel, int64_t tap_offset, int64_t& begin, int64_t& end) const {
        const int64_t part = out_channel / out_each;
        begin = part * in_each, end = begin + in_each;
        return data + (group_out + out_channel) * strides[0] + tap_offset - begin * strides[1];
    }
    float at(int64_t group_out, int64_t out_channel, int64_t in_channel, int64_t tap_offset) const {
        int64_t begin, end;
        const T* r = row(group_out, out_channel, tap_offset, begin, end);
        return in_channel < begin || in_channel >= end ? 0.0f : to_float(r[in_channel * strides[1]]);
    }
};

float rounded(float v, bool bfloat16) { return bfloat16 ? to_float(to_bf16(v)) : v; }

// One panel's tap: depth x kPanel words. `get(k, n)` is the weight as a float.
template <class Get>
void pack_tap(gemm::word* out, int64_t depth, int64_t count_k, int64_t count_n, gemm::Words words, bool bfloat16,
              Get&& get) {
    if (words == gemm::Words::kFloat) {
        float* to = reinterpret_cast<float*>(out);
        // Blocks of 16 k, so that a source row that runs along k is read a cache line at a time.
        for (int64_t k0 = 0; k0 < depth; k0 += 16) {
            const int64_t k1 = std::min(depth, k0 + 16);
            for (int64_t n = 0; n < gemm::kPanel; n++) {
                if (n >= count_n) {
                    for (int64_t k = k0; k < k1; k++) to[k * gemm::kPanel + n] = 0;
                } else {
                    for (int64_t k = k0; k < k1; k++) to[k * gemm::kPanel + n] = rounded(get(k, n), bfloat16);
                }
            }
        }
        return;
    }
    for (int64_t k = 0; k < depth; k++) {
        for (int64_t n = 0; n < gemm::kPanel; n++) {
            uint32_t word = 0;
            if (n < count_n) {
                word = to_bf16(get(2 * k, n)).bits;
                if (2 * k + 1 < count_k) word |= static_cast<uint32_t>(to_bf16(get(2 * k + 1, n)).bits) << 16;
            }
            out[k * gemm::kPanel + n] = word;
        }
    }
}

// The same for float weights of a group of its own, a block of vectors at a time. `row` strides n and `column` strides k.
void pack_tap_by_vectors(gemm::word* out, const float* from, int64_t row, int64_t column, int64_t count_k, int64_t count_n,
                         gemm::Words words, bool bfloat16) {
    for (int64_t n = 0; n < gemm::kPanel; n += W) {
        const int64_t rows = std::clamp<int64_t>(count_n - n, 0, W);
        for (int64_t k = 0; k < count_k; k += W) {
            const int64_t columns = std::min<int64_t>(W, count_k - k);
            vf v[W];
            if (row == 1 && rows == W) {
                for (int64_t i = 0; i < columns; i++) v[i] = load(from + n + (k + i) * column);
            } else {
                load_columns(from + n * row + k * column, row, column, rows, columns, v);
            }
            if (words == gemm::Words::kFloat) {
                float* to = reinterpret_cast<float*>(out) + k * gemm::kPanel + n;
                for (int64_t i = 0; i < columns; i++) store(to + i * gemm::kPanel, bfloat16 ? round_bf16(v[i]) : v[i]);
            } else {
                if (columns % 2) v[columns] = zero();   // W is even
                for (int64_t i = 0; i < columns; i += 2) {
                    store_bf16_pairs(out + (k + i) / 2 * gemm::kPanel + n, v[i], v[i + 1]);
                }
            }
        }
    }
}

template <class T>
void pack(const Problem& p, const Grouping& g, bool transposed, gemm::Words words, const PackedWeight& packed) {
    const WeightView<T> view{static_cast<const T*>(p.weight), p.weight_strides, g.merged, p.in_channels / p.groups,
                             p.out_channels / p.groups};
    const int64_t count_k = transposed ? g.out : g.in, columns = transposed ? g.in : g.out;
    const int64_t all = g.groups * packed.panels * packed.taps;
    const int64_t threads = useful_threads(all * packed.depth * gemm::kPanel / 4, p.threads);
    parallel(threads, [&](int64_t t) {
        const Range mine = share(all, 1, t, threads);
        for (int64_t index = mine.begin; index < mine.end; index++) {
            const int64_t tap = index % packed.taps, panel = index / packed.taps;
            const int64_t group_out = panel / packed.panels * g.out, first = panel % packed.panels * gemm::kPanel;
            const int64_t count_n = std::min(gemm::kPanel, columns - first);
            const int64_t offset = tap / p.kernel_w * p.weight_strides[2] + tap % p.kernel_w * p.weight_strides[3];
            gemm::word* out = packed.data + index * packed.tap_pitch();
            const int64_t depth = words_of(count_k, words);
            std::fill(out + depth * gemm::kPanel, out + packed.tap_pitch(), 0);   // the rest of a matrix tile
            if constexpr (std::is_same_v<T, float>) {
                if (g.merged == 1) {
                    const int64_t row = p.weight_strides[transposed ? 1 : 0], column = p.weight_strides[transposed ? 0 : 1];
                    const float* from = view.data + group_out * p.weight_strides[0] + first * row + offset;
                    pack_tap_by_vectors(out, from, row, column, count_k, count_n, words, p.bfloat16());
                    continue;
                }
            }
            pack_tap(out, depth, count_k, count_n, words, p.bfloat16(), [&](int64_t k, int64_t n) {
                return transposed ? view.at(group_out, k, first + n, offset) : view.at(group_out, first + n, k, offset);
            });
        }
    });
}

// dW[n, channel ... channel + count, tap] from consecutive sums.
void store_weight_gradient(const BackwardArguments& arguments, int64_t n, int64_t tap, int64_t channel, int64_t count,
                           const float* from) {
    const Problem& p = arguments.problem;
    const int64_t* strides = arguments.weight_gradient_strides;
    const auto factor = static_cast<float>(1 / arguments.gradient_factor);
    const int64_t to = n * strides[0] + channel * strides[1] + tap / p.kernel_w * strides[2] + tap % p.kernel_w * strides[3];
    if (p.weight_element) {
        bf16* out = static_cast<bf16*>(arguments.weight_gradient) + to;
        for (int64_t c = 0; c < count; c++) out[c * strides[1]] = to_bf16(from[c] * factor);
    } else {
        float* out = static_cast<float*>(arguments.weight_gradient) + to;
        for (int64_t c = 0; c < count; c++) out[c * strides[1]] = rounded(from[c] * factor, p.bfloat16());
    }
}

}  // namespace

Slicing::Slicing(int64_t depth, int64_t kernel_rows, int64_t kernel_columns, gemm::Words words) {
    constexpr int64_t kLeastWords = 16;
    const int64_t slice_bytes = words == gemm::Words::kBFloat16Tile ? 32 << 10 : 24 << 10;
    // Cycles, about: to load and store a register tile between two slices, and to turn from one tap to the next.
    constexpr int64_t kPass = 100, kTurn = 8;
    int64_t least = INT64_MAX;
    for (int64_t together = kernel_rows; together > 0; together--) {
        const int64_t fit = slice_bytes / (4 * gemm::kPanel * together * kernel_columns) / 8 * 8;
        const int64_t cuts = ceil_div(depth, std::max(kLeastWords, fit));
        const int64_t cost = cuts * (ceil_div(kernel_rows, together) * kPass + kernel_rows * kernel_columns * kTurn);
        if (cost < least) least = cost, rows = together, parts = cuts;
    }
}

PackedWeight pack_weight(const Problem& p, const Grouping& g, bool transposed, gemm::Words words, gemm::word* data) {
    const int64_t depth = depth_of(transposed ? g.out : g.in, words);
    const PackedWeight packed{data, p.kernel_h * p.kernel_w, depth, ceil_div(transposed ? g.in : g.out, gemm::kPanel)};
    if (p.weight_element) pack<bf16>(p, g, transposed, words, packed);
    else pack<float>(p, g, transposed, words, packed);
    return packed;
}

void write_weight_gradient(const BackwardArguments& arguments, const Grouping& g, const std::vector<float*>& parts,
                           int64_t row_pitch, bool transposed) {
    const Problem& p = arguments.problem;
    const int64_t in_each = p.in_channels / p.groups, out_each = p.out_channels / p.groups;
    const int64_t taps = p.kernel_h * p.kernel_w;
    parallel(p.threads, [&](int64_t t) {
        const Range mine = share(p.out_channels, 1, t, p.threads);
        std::vector<float> sum(static_cast<std::size_t>(taps * g.in));
        for (int64_t n = mine.begin; n < mine.end; n++) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (const float* part : parts) {
                if (!part) continue;
                const float* from = transposed ? part + n : part + n * row_pitch;
                const int64_t step = transposed ? row_pitch : 1;
                for (std::size_t i = 0; i < sum.size(); i++) sum[i] += from[static_cast<int64_t>(i) * step];
            }
            const int64_t skipped = n % g.out / out_each * in_each;   // inputs of the groups merged before this one's
            for (int64_t tap = 0; tap < taps; tap++) {
                store_weight_gradient(arguments, n, tap, 0, in_each, sum.data() + tap * g.in + skipped);
            }
        }
    });
}

void write_weight_block(const BackwardArguments& arguments, const Block& block, const float* sums, int64_t row_pitch) {
    const Problem& p = arguments.problem;
    for (int64_t n = 0; n < p.out_channels; n++) {
        for (int64_t tap = 0; tap < p.kernel_h * p.kernel_w; tap++) {
            store_weight_gradient(arguments, n, tap, block.channel, block.channels, sums + n * row_pitch + tap * block.in);
        }
    }
}

}  // namespace bnr::conv
