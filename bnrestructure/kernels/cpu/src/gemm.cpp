#include "gemm.h"

#include <algorithm>
#include <utility>

#include "gemm_tile.h"

namespace bnr::gemm {

void multiply_bfloat16_pairs(const Product& product, Order order, Prefetch& prefetch);   // gemm_bf16.cpp
void multiply_bfloat16_tiles(const Product& product, Prefetch& prefetch);                // gemm_amx.cpp

namespace {
constexpr int64_t kLine = 64;
const char dummy_line[kLine] = {};
const char* const dummy = dummy_line;
}  // namespace

void Prefetch::add(const void* base, int64_t pitch, int64_t rows, int64_t bytes) {
    if (pitch == bytes) bytes *= rows, rows = rows > 0;
    for (int64_t r = 0; r < rows; r++) {
        const char* row = static_cast<const char*>(base) + r * pitch;
        for (int64_t offset = 0; offset < bytes; offset += kLine) lines_.push_back(row + offset);
    }
}

int64_t Prefetch::rate(int64_t steps) {
    constexpr int64_t kUsual = 4, kMost = 16;
    steps_ += steps;
    if (steps_before_ == 0) return kUsual;
    return std::min((static_cast<int64_t>(lines_.size()) + steps_before_ - 1) / steps_before_, kMost);
}

const char* const* Prefetch::take(int64_t count, int64_t& step) {
    const auto size = static_cast<int64_t>(lines_.size());
    if (next_ >= size) {
        step = 0;
        return &dummy;
    }
    if (next_ + count > size) lines_.resize(static_cast<std::size_t>(next_ + count), dummy);
    step = 1;
    const char* const* run = lines_.data() + next_;
    next_ += count;
    return run;
}

void multiply(const Product& product, Order order, Words words, Prefetch& prefetch) {
    if (product.m <= 0 || product.n <= 0) return;
    if (words == Words::kBFloat16Tile) {
        multiply_bfloat16_tiles(product, prefetch);
    } else if (words == Words::kBFloat16Pair) {
        multiply_bfloat16_pairs(product, order, prefetch);
    } else if (order == Order::kRows) {
        multiply_panels<Order::kRows, FloatWords>(product, prefetch);
    } else {
        multiply_panels<Order::kColumns, FloatWords>(product, prefetch);
    }
}

}  // namespace bnr::gemm
