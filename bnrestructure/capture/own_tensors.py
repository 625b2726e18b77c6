"""The tensors that a module tree has when its capture begins: under which names a graph finds them, and whether they are still there."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["OwnTensors"]


class OwnTensors:
    """The parameters, buffers and other tensors of a module tree at one moment."""

    def __init__(self, root: nn.Module) -> None:
        self._paths: dict[int, str] = {}
        self._registered: dict[nn.Module, list[int]] = {}
        for prefix, module in root.named_modules():
            dot = f"{prefix}." if prefix else ""
            self._registered[module] = _registered(module)
            for source in (module._parameters, module._buffers, module.__dict__):
                for name, value in source.items():
                    if issubclass(type(value), Tensor):  # isinstance() asks a weak proxy, whose object may be gone
                        self._paths.setdefault(id(value), dot + name)

    def path_of(self, tensor: Tensor) -> str | None:
        """The attribute path of one of these, None for any other tensor."""
        return self._paths.get(id(tensor))

    def are_in_place(self, module: nn.Module) -> bool:
        """Whether a submodule has its own parameters and buffers: ``functional_call`` puts others in their place."""
        return all(m not in self._registered or _registered(m) == self._registered[m] for m in module.modules())


def _registered(module: nn.Module) -> list[int]:
    return [id(t) for values in (module._parameters, module._buffers) for t in values.values()]
