// The weight as panels for the matrix products, and the weight gradient back out of its accumulators.
#pragma once

#include <algorithm>

#include "conv_geometry.h"
#include "parallel.h"

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

// How a panel is cut into slices that stay in the first-level cache while the rows of a tile go by: so many rows of the kernel
// at a time, and the words of each tap in so many parts.
struct Slicing {
    Slicing(int64_t depth, int64_t kernel_rows, int64_t kernel_columns, gemm::Words words);

    int64_t rows, parts;
};

// A part of a panel: columns [n, n + width), words [k, k + length) of each tap in `rows`, rows of the kernel.
struct Slice {
    int64_t n, width, k, length;
    Range rows;

    // Of a row of the result whose first tap is in row `first` of the kernel: whether the slice has nothing for it yet, and
    // whether it adds to what other slices have left (or is the first, and overwrites).
    bool ends_before(int64_t first) const { return rows.end <= first; }
    bool adds(int64_t first) const { return k > 0 || rows.begin > first; }
};

// f(slice) for every slice of every panel. The slices of a panel follow each other, so that the result's columns are in cache
// when they are added to.
template <class F>
void for_each_slice(int64_t columns, int64_t depth, int64_t kernel_rows, int64_t kernel_columns, gemm::Words words, F&& f) {
    const Slicing slicing(depth, kernel_rows, kernel_columns, words);
    const int64_t unit = gemm::padded_depth(1, words), units = depth / unit;
    for (int64_t n = 0; n < columns; n += gemm::kPanel) {
        for (int64_t row = 0; row < kernel_rows; row += slicing.rows) {
            for (int64_t i = 0; i < slicing.parts; i++) {
                const int64_t begin = units * i / slicing.parts * unit, end = units * (i + 1) / slicing.parts * unit;
                f(Slice{n, std::min(gemm::kPanel, columns - n), begin, end - begin,
                        {row, std::min(kernel_rows, row + slicing.rows)}});
            }
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
