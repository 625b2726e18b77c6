"""Too little memory of a device, by whatever name it comes."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]

#: What too little memory is called by those who do not raise torch.OutOfMemoryError. Triton's "out of resource" is shared memory: a bug.
_WORDS = ("out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, says that the device's memory is too small."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words.lower() in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
