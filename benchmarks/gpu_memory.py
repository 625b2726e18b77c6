"""The GPU's memory in benchmarks/gpu.py: given back between units, and recognised when there is too little of it."""

from __future__ import annotations

import gc

import torch

__all__ = ["is_out_of_memory", "no_convolution_found", "release_memory"]

#: What too little memory is called by those who do not raise torch.OutOfMemoryError. Triton's "out of resource" is shared memory: a bug.
_WORDS = ("out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
#: What PyTorch says when cuDNN's plans all failed, be it for their workspaces.
_NO_CONVOLUTION = ("unable to find an engine to execute", "Unable to find a valid cuDNN algorithm")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, says that the device's memory is too small."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words.lower() in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_convolution_found(error: BaseException) -> bool:
    """Whether no convolution could run: for sizes that run in smaller batches that, too, is for want of memory."""
    return any(words in str(error) for words in _NO_CONVOLUTION)


def release_memory() -> None:
    """Give what the last unit needed back to the GPU, which other workers may share."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
