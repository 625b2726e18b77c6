"""Other ways to train in less memory, and eager without batch norm at all: what ``bench --rivals`` and ``--against`` time beside us."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnrestructure.core.errors import UsageError, first_line

__all__ = ["BUDGETS", "CHECKPOINTED", "IN_PLACE", "NO_BATCH_NORM", "RIVALS_FOR_MEMORY", "blocks", "missing_reason", "rebuilt"]

CHECKPOINTED = "checkpoint per block"
#: torch.compile told to keep so much of what it would keep for backward, and to compute the rest again.
BUDGETS = {"torch.compile, memory budget 0.5": 0.5, "torch.compile, memory budget 0.3": 0.3}
IN_PLACE = "inplace_abn"
NO_BATCH_NORM = "eager without batch norm"

RIVALS_FOR_MEMORY = (CHECKPOINTED, *BUDGETS, IN_PLACE)
_LEAK = 0.01


def missing_reason(name: str, dtype: str) -> str | None:
    """Why a rival cannot be timed here; None when it can."""
    if name == IN_PLACE and importlib.util.find_spec("inplace_abn") is None:
        return "it is not installed (pip install inplace-abn compiles it)"
    if name == IN_PLACE and dtype != "fp32":
        return "it knows no autocast"
    return None


def rebuilt(name: str, model: nn.Module) -> nn.Module:
    """The model as a rival has it, changed in place where that can be. Raises UsageError where it cannot be had."""
    if name == CHECKPOINTED:
        for block in blocks(model):
            block.forward = _recomputed(block.forward)
        return model
    if name == NO_BATCH_NORM:
        return _without_batch_norm(model)
    if name == IN_PLACE:
        return _with_in_place_abn(model)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that are recomputed one by one: the outermost modules with a batch norm inside, behind plain containers."""
    found = list(_blocks(model))
    while len(found) == 1:  # a wrapper
        inner = list(_blocks(found[0]))
        if not inner:
            break
        found = inner
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        elif any(True for _ in child.children()) and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in child.modules()):
            yield child


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _without_batch_norm(model: nn.Module) -> nn.Module:
    """Each batch norm an identity: what is left is the time of everything else. It is not a model that anybody would train."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())
    return model


def _with_in_place_abn(model: nn.Module) -> nn.Module:
    """Batch norms, with the ReLU (or ReLU6) behind them where there is one, as in-place activated ones of leaky ReLU.

    Another function than the model's: an in-place layer needs an activation that can be inverted. After Rota Bulò et al., "In-Place
    Activated BatchNorm for Memory-Optimized Training of DNNs", arXiv 1712.02616.
    """
    try:
        gm = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the user's forward on proxies
        raise UsageError(f"torch.fx cannot trace the model: {first_line(error)}") from error
    layers = dict(gm.named_modules())
    for node in list(gm.graph.nodes):
        if node.target is operator.iadd:  # it would write into an output that is needed again
            node.target = operator.add
        if node.op == "call_module" and isinstance(layers[node.target], nn.BatchNorm2d) and len(node.all_input_nodes[0].users) == 1:
            _replace(gm, node, layers)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _replace(gm: fx.GraphModule, node: fx.Node, layers: dict[str, nn.Module]) -> None:
    from inplace_abn import InPlaceABN

    old = layers[str(node.target)]
    assert isinstance(old, nn.BatchNorm2d)
    readers = list(node.users)
    activated = len(readers) == 1 and _is_relu(readers[0], layers)
    kind = {"activation": "leaky_relu", "activation_param": _LEAK} if activated else {"activation": "identity"}
    new = InPlaceABN(old.num_features, eps=old.eps, momentum=old.momentum, **kind)
    if activated:
        readers[0].replace_all_uses_with(node)
        gm.graph.erase_node(readers[0])
    gm.set_submodule(str(node.target), new)


def _is_relu(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(layers[str(node.target)], nn.ReLU | nn.ReLU6)
    return node.target in (F.relu, torch.relu, "relu", Tensor.relu)
