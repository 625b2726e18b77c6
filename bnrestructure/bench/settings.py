"""What a benchmark is asked to measure; plain data, for it travels to the processes that measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnrestructure.core.errors import UsageError

__all__ = ["DTYPES", "MALLOC", "Settings"]

#: Training dtypes by their short names: bf16 means autocast over fp32 parameters.
DTYPES = ("fp32", "bf16")

#: Environment of glibc's allocator. ``tuned`` keeps freed activations in the heap instead of giving them back to the
#: kernel and faulting them in again, page by page, at every step. It makes eager faster too: both are of interest.
MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184"},
}


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    model          a torchvision name, ``package.module:factory``, ``file.py:factory`` or ``timm:NAME``
    input_size     [C,] [T,] H, W or one number for both; None for what the model is usually trained on
    inputs         ``module:factory`` of the model's arguments, instead of random ones of that size
    dtype          fp32 or bf16 (autocast)
    threads        of intra-op parallelism; None for PyTorch's default
    malloc         names of MALLOC, one section of the result each
    ladder         time the rungs of the paper's ladder as well
    compile        time torch.compile as well, unless it needs more than ``compile_limit`` seconds to compile
    tune           before timing, measure the candidate kernels on these shapes (see bnrestructure.tune)
    memory         measure peak memory, each variant in a fresh process
    rivals         names of bench/rivals.py's other ways to save memory, timed beside the rest
    against        names of further variants: eager without batch norm
    curves         record what memory is held over one step, variant by variant
    """

    model: str
    batch: int = 16
    input_size: tuple[int, ...] | None = None
    inputs: str | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    backend: str = "auto"
    threads: int | None = None
    rounds: int = 10
    warmup: int = 2
    malloc: tuple[str, ...] = ("default", "tuned")
    ladder: bool = False
    compile: bool = False
    compile_limit: float = 600.0
    tune: bool = False
    memory: bool = True
    rivals: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    curves: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise UsageError(f"warmup must be at least 0, got {self.warmup}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r} (dtypes: {', '.join(DTYPES)})")
        for name in self.malloc:
            if name not in MALLOC:
                raise UsageError(f"unknown malloc setting {name!r} (settings: {', '.join(MALLOC)})")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """From the dict that ``dataclasses.asdict`` makes, after a trip through JSON."""
        size = data["input_size"]
        lists = {name: tuple(data[name]) for name in ("malloc", "rivals", "against")}
        return cls(**(data | lists | {"input_size": None if size is None else tuple(size)}))
