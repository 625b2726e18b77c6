"""The plan: where the halves of each batch norm went, why not onto a neighbour, and which kernels run."""
