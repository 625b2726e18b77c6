"""The modules that a forward is inside of."""

from __future__ import annotations

from torch import nn

__all__ = ["Trail"]


class Trail:
    """The modules that the forward is inside of, outermost first, as (path, module)."""

    def __init__(self) -> None:
        self.modules: list[tuple[str, nn.Module]] = []

    def stack(self) -> dict[str, tuple[str, type]]:
        """As ``nn_module_stack`` of torch.fx has it."""
        return {path: (path, type(module)) for path, module in self.modules}
