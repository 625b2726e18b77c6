"""What Triton compiles for a launch: the kernel with the types, the constants and what it knows of the run-time arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bnrestructure.kernels.cuda.launch import FP_FUSION, Launch

__all__ = ["Specialisation"]

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}

#: Names of compile-time arguments that make up a tile, in the order in which tables show them.
_TILE = ("BM", "BN", "BK", "BT", "BR", "BC", "HEIGHT", "WIDTH", "BLOCK")


@dataclass(frozen=True)
class Specialisation:
    """A kernel as it is compiled for a part (a compute capability, 90 for 9.0)."""

    kernel: Any
    part: int
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    warps: int
    stages: int

    @classmethod
    def of(cls, launch: Launch, part: int) -> Specialisation:
        """What the launch's arguments call for. Storages of tensors on meta are taken to be aligned, their offsets as they are."""
        launch = launch.on(part)
        signature: dict[str, str] = {}
        constants: dict[str, Any] = dict(launch.constants)
        attributes: dict[tuple[int], list[list[Any]]] = {}
        names = launch.kernel.arg_names
        for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
            aligned = False
            as_it_is = launch.kernel.params[i].do_not_specialize
            if value is None or (type(value) is int and value == 1 and not as_it_is):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                aligned = int(value.storage_offset()) * value.element_size() % 16 == 0
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and not as_it_is
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(launch.constants, "constexpr")
        ordered = {name: signature[name] for name in names}
        return cls(launch.kernel, part, ordered, constants, attributes, launch.warps, launch.stages)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__).strip("_")

    @cached_property
    def key(self) -> str:
        """The same for specialisations that are compiled to the same code."""
        return repr((self.name, self.part, self.signature, self.constants, self.attributes, self.warps, self.stages))

    @property
    def tile(self) -> str:
        """``128x64x64``: rows by channels by depth, of a depthwise kernel also by the height and the width of a patch."""
        return "x".join(str(self.constants[name]) for name in _TILE if name in self.constants)

    def compile(self) -> Any:
        """Triton's result, from its cache where it is there. Needs no GPU, and no TRITON_INTERPRET."""
        source = ASTSource(self.kernel, self.signature, constexprs=self.constants, attrs=self.attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": FP_FUSION}
        return triton.compile(source, target=GPUTarget("cuda", self.part, 32), options=options)
