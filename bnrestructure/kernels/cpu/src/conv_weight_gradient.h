// The weight gradient of a layer whose sums do not fit into the cache beside a tile: see conv_weight_gradient.cpp.
#pragma once

#include "arguments.h"

namespace bnr::conv {

// Whether the weight gradient is better computed from the whole batch, or large parts of it, a block of input channels after the
// other.
bool prefers_whole_batch(const BackwardArguments& arguments);

// weight_gradient and bias_gradient of these arguments; dx must be null.
void weight_gradient_of_batch(const BackwardArguments& arguments);

}  // namespace bnr::conv
