// The weight as panels for the matrix products, and the weight gradient back out of its accumulators.
#pragma once

#include <algorithm>

#include "conv_geometry.h"

namespace bnr::conv {

// Panels of kPanel output columns: word (k, n) of tap t of panel j of group g is at
// (((g * panels + j) * taps + t) * depth + k) * kPanel + n.
struct PackedWeight {
    gemm::word* data;
    int64_t taps, depth, panels;

    static int64_t size(int64_t groups, int64_t taps, int64_t depth, int64_t columns) {
        return groups * ceil_div(columns, gemm::kPanel) * taps * depth * gemm::kPanel;
    }
    int64_t tap_pitch() const { return depth * gemm::kPanel; }
    int64_t panel_pitch() const { return taps * tap_pitch(); }
    const gemm::word* panel(int64_t group, int64_t index) const {
        return data + (group * panels + index) * panel_pitch();
    }
};

// Words of each tap's depth that keep a panel's slice in the first-level cache while the rows of a tile go by.
constexpr int64_t slice_depth(int64_t taps) { return std::max<int64_t>(16, (24 << 10) / (4 * gemm::kPanel * taps) / 8 * 8); }

// f(n, k, width, length) for every slice of every panel: columns [n, n + width), words [k, k + length) of each tap. The
// slices of a panel follow each other, so that the result's columns are in cache when they are added to.
template <class F>
void for_each_slice(int64_t columns, int64_t depth, int64_t taps, F&& f) {
    const int64_t most = std::min(depth, slice_depth(taps)), slices = ceil_div(depth, most);
    for (int64_t n = 0; n < columns; n += gemm::kPanel) {
        for (int64_t i = 0; i < slices; i++) {
            const int64_t begin = depth * i / slices, end = depth * (i + 1) / slices;
            f(n, begin, std::min(gemm::kPanel, columns - n), end - begin);
        }
    }
}

// Forward: k runs over the group's input channels, n over its output channels. Transposed, for the input gradient: the
// other way round. `data` has PackedWeight::size words.
PackedWeight pack_weight(const Problem& p, const Grouping& g, bool transposed, gemm::Words words, gemm::word* data);

// Adds up the threads' accumulators, rows of [taps, in] of the given pitch per group and output channel (or transposed), and
// writes them to the weight gradient. parts may be null: zero.
void write_weight_gradient(const BackwardArguments& arguments, const Grouping& g, const std::vector<float*>& parts,
                           int64_t row_pitch, bool transposed);

// Writes the sums of a block of input channels, of a convolution in one group, to the weight gradient: output channel n, tap
// t, channel c is at sums[n * row_pitch + t * block.in + c].
void write_weight_block(const BackwardArguments& arguments, const Block& block, const float* sums, int64_t row_pitch);

}  // namespace bnr::conv
