// gemm::multiply on pairs of bfloat16 values, where the processor multiplies them; elsewhere it is never called.
#include <algorithm>
#include <utility>

#include "gemm.h"
#include "gemm_tile.h"

namespace bnr::gemm {

void multiply_bfloat16_pairs(const Product& product, Order order, Prefetch& prefetch) {
#if defined(__AVX512BF16__)
    if (order == Order::kRows) {
        multiply_panels<Order::kRows, BFloat16PairWords>(product, prefetch);
    } else {
        multiply_panels<Order::kColumns, BFloat16PairWords>(product, prefetch);
    }
#else
    (void)product, (void)order, (void)prefetch;
    __builtin_trap();
#endif
}

}  // namespace bnr::gemm
