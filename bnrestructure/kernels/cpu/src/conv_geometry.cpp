#include "conv_geometry.h"

#include <unistd.h>

#include <algorithm>

namespace bnr::conv {

namespace {

int64_t largest_divisor_up_to(int64_t n, int64_t limit) {
    for (int64_t d = std::min(n, limit); d > 1; d--) {
        if (n % d == 0) return d;
    }
    return 1;
}

}  // namespace

Problem flattened(const Problem& p) {
    Problem q = p;
    if (p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 && p.padding_h == 0 && p.padding_w == 0) {
        q.in_height = q.out_height = p.in_height * p.in_width;
        q.in_width = q.out_width = 1;
    }
    return q;
}

Grouping::Grouping(const Problem& p, int64_t channel_limit) {
    const int64_t in_each = p.in_channels / p.groups, out_each = p.out_channels / p.groups;
    const int64_t width = p.bfloat16() && gemm::has_bfloat16_tiles() ? 2 * gemm::kTileWords : W;
    merged = largest_divisor_up_to(p.groups, width / std::max(in_each, out_each));
    groups = p.groups / merged;
    in = in_each * merged;
    out = out_each * merged;
    if (in > channel_limit) {
        const int64_t part = round_up(ceil_div(in, ceil_div(in, channel_limit)), gemm::kPanel);
        for (int64_t g = 0; g < groups; g++) {
            for (int64_t c = 0; c < in; c += part) {
                const int64_t width = std::min(part, in - c);
                blocks.push_back({g * in + c, width, g, 1, c, width});
            }
        }
        return;
    }
    const int64_t together = std::min(groups, std::max<int64_t>(1, channel_limit / in));
    for (int64_t g = 0; g < groups; g += together) {
        const int64_t count = std::min(together, groups - g);
        blocks.push_back({g * in, count * in, g, count, 0, in});
    }
}

Window::Window(const Problem& p, gemm::Words words, bool paired) {
    row_step = p.kernel_h == 1 ? p.stride_h : 1;
    column_step = p.kernel_w == 1 ? p.stride_w : 1;
    row_stride = p.stride_h / row_step;
    column_stride = p.stride_w / column_step;
    columns = (p.out_width - 1) * column_stride + (p.kernel_w - 1) * p.dilation_w + 1;
    column_begin = std::min(columns, ceil_div(p.padding_w, column_step));
    column_end = std::min(columns, (p.in_width - 1 + p.padding_w) / column_step + 1);
    column_end = std::max(column_begin, column_end);
    free_rows = p.kernel_h == 1 && p.padding_h == 0;
    flat = free_rows && p.kernel_w == 1 && p.padding_w == 0 && p.stride_h == 1 && p.stride_w == 1;
    const bool tiles = words == gemm::Words::kBFloat16Tile;
    joined = !tiles && p.groups == 1 && p.kernel_w > 1 && p.dilation_w == 1 && words_of(p.in_channels, words) < W;
    if (tiles && paired && !flat) columns = round_up(columns, 2 * column_stride);
}

int64_t Window::pixels_in_row(const Problem& p, gemm::Words words) const {
    const int64_t staged = row_stride * columns;
    const bool uniform = words == gemm::Words::kBFloat16Tile && staged % column_stride == 0;
    return uniform && staged / column_stride < round_up(p.out_width, gemm::kTileWords) ? staged / column_stride : p.out_width;
}

bool Window::pairs_cross_rows(const Problem& p) const {
    return flat || row_stride * columns < 2 * column_stride * round_up(ceil_div(p.out_width, 2), gemm::kTileWords);
}

int64_t Window::pairs_in_row(const Problem& p) const {
    return pairs_cross_rows(p) ? row_stride * columns / (2 * column_stride) : round_up(ceil_div(p.out_width, 2), gemm::kTileWords);
}

Tiling::Tiling(const Problem& p, const Window& w, int64_t row_bytes, int64_t halo_rows, int64_t budget,
               int64_t pixel_limit) {
    images = w.free_rows ? 1 : p.batch;
    image_rows = w.free_rows ? p.batch * p.out_height : p.out_height;
    const int64_t each = ceil_div(images * image_rows, p.threads);
    int64_t rows = std::max<int64_t>(budget / row_bytes - halo_rows, 1);
    rows = std::min({rows, std::max<int64_t>(1, pixel_limit / p.out_width), each});
    tile_images = 1;
    if (rows >= image_rows) {
        tile_rows = image_rows;
        strips = 1;
        // As many images a tile as fit, but every thread the same number of tiles.
        const int64_t fit = std::max<int64_t>(1, rows / (image_rows + halo_rows));
        const int64_t images_each = ceil_div(images, p.threads);
        tile_images = ceil_div(images_each, ceil_div(images_each, fit));
    } else {
        strips = ceil_div(image_rows, rows);
        // A single (joined) image is split so that every thread gets as many strips as the others.
        if (images == 1) strips = std::min(round_up(strips, p.threads), image_rows);
        tile_rows = ceil_div(image_rows, strips);
        strips = ceil_div(image_rows, tile_rows);
    }
    count = ceil_div(images, tile_images) * strips;
}

Tile Tiling::at(int64_t index) const {
    const int64_t image = index / strips * tile_images, row = index % strips * tile_rows;
    return {image, std::min(tile_images, images - image), row, std::min(tile_rows, image_rows - row)};
}

int64_t cache_size() {
    static const int64_t size = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
        const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
        const long l2 = 0;
#endif
        return static_cast<int64_t>(l2 > 0 ? std::clamp(l2, 256L << 10, 2L << 20) : 512L << 10);
    }();
    return size;
}

gemm::Words words_for(const Problem& p, const Grouping& grouping) {
    if (p.bfloat16() && gemm::has_bfloat16_tiles()) return gemm::Words::kBFloat16Tile;
    // A group must begin on a whole word, in x and in y.
    const bool whole = grouping.groups == 1 || (grouping.in % 2 == 0 && grouping.out % 2 == 0);
    return p.bfloat16() && whole && gemm::has_bfloat16_pairs() ? gemm::Words::kBFloat16Pair : gemm::Words::kFloat;
}

}  // namespace bnr::conv
