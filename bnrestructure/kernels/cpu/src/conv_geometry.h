// How a convolution is cut up: groups, blocks of input channels, staged pixels, tiles for the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "gemm.h"

namespace bnr::conv {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Quotients rounded down and up for a possibly negative numerator.
constexpr int64_t floor_quotient(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
constexpr int64_t ceil_quotient(int64_t a, int64_t b) { return -floor_quotient(-a, b); }

// Words that hold `channels` adjacent values of one pixel.
constexpr int64_t words_of(int64_t channels, gemm::Words words) {
    return words == gemm::Words::kFloat ? channels : (channels + 1) / 2;
}

// How far a product over `channels` channels runs along k.
constexpr int64_t depth_of(int64_t channels, gemm::Words words) { return gemm::padded_depth(words_of(channels, words), words); }

// Where the channels of a staged pixel are: one group after the other, each, where matrix tiles read on to their end, followed by
// zeros, since the next group's infinity times zero would be a NaN.
struct StagedChannels {
    StagedChannels(int64_t groups, int64_t each, gemm::Words words)
        : group_words(groups > 1 ? depth_of(each, words) : words_of(each, words)), words(words),
          runs(groups > 1 && group_words != words_of(each, words) ? groups : 1), width(groups * each / runs), size(groups * group_words) {}

    int64_t group_words;   // from one group to the next
    gemm::Words words;
    int64_t runs, width;   // runs of so many channels that are adjacent
    int64_t size;          // words
};

// A pixel pitch in words, whole vectors, and off the powers of two that would map a tile's rows onto one cache set.
constexpr int64_t scratch_pitch(int64_t words) {
    const int64_t pitch = round_up(words, 16);
    return pitch % 128 == 0 ? pitch + 16 : pitch;
}

// The same problem with its pixels in one long column where the kernel sees single pixels: tiles of any size then.
Problem flattened(const Problem& p);

// Consecutive input channels that are staged together: several whole groups, or a part of one.
struct Block {
    int64_t channel, channels;   // in x
    int64_t group, groups;
    int64_t in_begin, in;        // channels within each group
};

// The convolution after narrow groups are merged: `merged` original groups form one dense group whose off-diagonal
// weights are zero. A 4-channel group would leave most lanes of a vector, or of a tile, idle in any case. An infinity
// times such a zero is a NaN.
struct Grouping {
    Grouping(const Problem& p, int64_t channel_limit);

    int64_t merged;
    int64_t groups, in, out;     // after merging
    std::vector<Block> blocks;
};

// The staged input: transformed, zero-padded pixels, only those that the kernel reads.
struct Window {
    // `paired`: the backward pass's, whose tiles pair the columns that neighbouring output pixels read: whole pairs then.
    Window(const Problem& p, gemm::Words words, bool paired = false);

    int64_t row_step, column_step;       // input rows / columns per staged row / column
    int64_t row_stride, column_stride;   // staged rows / columns per output row / column
    int64_t columns;                     // staged columns
    int64_t column_begin, column_end;    // those that hold input; the rest is padding
    bool free_rows;                      // output rows need no neighbours: images may be joined
    bool flat;                           // every output pixel reads one pixel of a contiguous run: a plain matrix
    bool joined;                         // few channels: a row of the kernel is one run of adjacent words

    // Pixels from one output row to the next in the product of a tile. Matrix tiles cross from row to row where that takes fewer of
    // them: the columns of padding between two rows are multiplied, too, and what comes of them is dropped.
    int64_t pixels_in_row(const Problem& p, gemm::Words words) const;

    // Of a backward pass on matrix tiles: words from one output row to the next in its gradient as transposed pairs, and whether that
    // is the staged input's distance, so that a product may run on from row to row. Else every row ends with a whole tile.
    bool pairs_cross_rows(const Problem& p) const;
    int64_t pairs_in_row(const Problem& p) const;

    // Input row of an output row's kernel row; outside [0, in_height) it is padding. With free rows `row` counts through
    // the batch.
    static int64_t input_row(const Problem& p, int64_t row, int64_t kernel_row) {
        return row * p.stride_h + kernel_row * p.dilation_h - p.padding_h;
    }
    int64_t staged_rows(const Problem& p, int64_t out_rows) const {
        return (out_rows - 1) * row_stride + (p.kernel_h - 1) * p.dilation_h + 1;
    }
};

// Output rows [row, row + rows) of each of `images` images. With free rows the whole batch is one image.
struct Tile {
    int64_t image, images, row, rows;
};

struct Tiling {
    // `row_bytes`: scratch per output row; `halo_rows`: output rows' worth of scratch that every strip adds.
    Tiling(const Problem& p, const Window& w, int64_t row_bytes, int64_t halo_rows, int64_t budget,
           int64_t pixel_limit);

    int64_t images, image_rows;          // of the (joined) batch
    int64_t tile_images, tile_rows;
    int64_t strips;                      // per image
    int64_t count;

    Tile at(int64_t index) const;
};

// Bytes of second-level cache a core has, within reason.
int64_t cache_size();

// How the operands of the matrix products are stored for this problem and processor.
gemm::Words words_for(const Problem& p, const Grouping& grouping);

}  // namespace bnr::conv
