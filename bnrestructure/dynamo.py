"""``torch.compile(model, backend="bnrestructure")``: the same passes on the graph that Dynamo captured.

What is ours runs as eager autograd functions; what is not goes to inductor in pieces between them, or stays eager. A
graph in which nothing is restructured goes to inductor whole.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from bnrestructure.core.errors import BrokenGraphError, UsageError
from bnrestructure.graph.inplace import inplace_target
from bnrestructure.graph.ir import BatchNorm, has_fused, is_fused
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.targets import called_name
from bnrestructure.kernels import registry
from bnrestructure.passes import pipeline
from bnrestructure.passes.finish import finish
from bnrestructure.passes.prepare import prepare
from bnrestructure.patterns.base import found_at
from bnrestructure.patterns.batch_norm import batch_norm

__all__ = ["bnrestructure"]

_OPTIONS = {"rest": "inductor", "backend": "auto", "passes": None}
_RESTS = ("inductor", "eager")

Compiled = Callable[..., Any]


def bnrestructure(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """The Dynamo backend. ``options`` of torch.compile:

    rest      what compiles the nodes that are not ours: inductor (the default) or eager
    backend   kernels of the fused nodes: auto, reference, cpu or cuda
    passes    names of passes or a rung of the ladder, as in :func:`bnrestructure.restructure`

    ``mode`` is handed to inductor. Graphs captured without gradients, or without a batch norm that uses batch
    statistics, go to the rest whole. Raises UsageError for unknown options.
    """
    rest, backend, passes = _checked(options or {})
    rewritten = _copied(gm)
    prepare(rewritten, _module_of)
    if not torch.is_grad_enabled() or not any(found_at(batch_norm, rewritten.graph.nodes)):
        return _whole(gm, example_inputs, rest, mode)
    try:
        pipeline.rewrite(rewritten, passes, backend)
    except BrokenGraphError as error:
        warnings.warn(f"bnrestructure: {error}. Please report this fault; the graph goes to {rest} as it was", stacklevel=2)
        return _whole(gm, example_inputs, rest, mode)
    if not has_fused(rewritten.graph):
        return _whole(gm, example_inputs, rest, mode)
    finish(rewritten)  # Dynamo has told the code behind this graph what strides to expect
    rewritten.graph.eliminate_dead_code(_is_impure)
    rewritten.recompile()
    return rewritten.forward if rest == "eager" else _with_pieces(rewritten, mode).forward


def _checked(options: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"torch.compile: backend bnrestructure has no option {name!r}{hint} (options: {', '.join(_OPTIONS)})"
            )
    values = {**_OPTIONS, **options}
    if values["rest"] not in _RESTS:
        raise UsageError(f"torch.compile: option 'rest' is one of {', '.join(_RESTS)}, got {values['rest']!r}")
    if values["backend"] not in registry.BACKENDS:
        raise UsageError(
            f"torch.compile: unknown backend {values['backend']!r} (backends: {', '.join(registry.BACKENDS)})"
        )
    return values["rest"], values["backend"], pipeline.resolve(values["passes"])


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of our own to rewrite: Dynamo's must stay as it is for whoever gets it whole."""
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    return fx.GraphModule(gm, graph)


def _module_of(node: fx.Node) -> str:
    """``layer1.0.bn1`` from Dynamo's ``L['self']._modules['layer1'].0.bn1`` and kin; else the node's name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"\._modules\['([^']+)'\]|\[(?:'([^']+)'|(\d+))\]", lambda m: f".{m[1] or m[2] or m[3]}", path)
    return re.sub(r"^L\.self\.?", "", path) or node.name


def _whole(gm: fx.GraphModule, example_inputs: Sequence[Any], rest: str, mode: str | None) -> Compiled:
    if rest == "eager":
        return gm.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else None
    return cast(Compiled, compile_fx(gm, list(example_inputs), config_patches=patches))


def _is_impure(node: fx.Node) -> bool:
    """What must stay although nothing reads it: in-place operations, running statistics, random draws."""
    if node.is_impure() or is_fused(node) or node.op in ("placeholder", "output"):
        return True
    return BatchNorm.of(node) is not None or inplace_target(node) is not None or node.op == "call_method"


def _with_pieces(gm: fx.GraphModule, mode: str | None) -> fx.GraphModule:
    """Split the graph into runs of consecutive nodes, ours and the rest, and compile each piece of the rest.

    A piece is compiled when it is first called, with the tensors that it is then given: fused nodes may hand on other
    strides than the example values have, and Dynamo's own guards take care of changing shapes.
    """
    pieces: dict[fx.Node, int] = {}
    foreign: list[bool] = []
    previous: bool | None = None
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        theirs = _is_worth_compiling(node)
        if theirs is None:
            theirs = bool(previous)  # goes with its neighbours
        if theirs != previous:
            foreign.append(theirs)
            previous = theirs
        pieces[node] = len(foreign) - 1
    split = split_module(gm, gm, lambda node: pieces[node], keep_original_order=True)
    for name, child in list(split.named_children()):
        if name.startswith("submod_") and foreign[int(name.removeprefix("submod_"))]:
            setattr(split, name, _Piece(child, mode))
    return split


def _is_worth_compiling(node: fx.Node) -> bool | None:
    """True for computation that is not ours, False for what must run with ours, None for views and sizes."""
    if BatchNorm.of(node) is not None:
        return True  # left whole because nothing was won: inductor can
    if _is_ours(node):
        return False
    example = node.meta.get("example_value")
    if inplace_target(node) is not None and isinstance(example, Tensor) and example.dim() == 0:
        return False  # num_batches_tracked.add_(1): a piece of its own would cost more than it does
    return None if not isinstance(example, Tensor) or _is_view(node) else True


def _is_ours(node: fx.Node) -> bool:
    """Fused nodes and the per-channel vectors between them."""
    module = getattr(node.target, "__module__", None) or ""
    if module.startswith("bnrestructure."):
        return True
    if provenance(node).vector:
        return True
    return (
        bool(node.args)
        and isinstance(node.args[0], fx.Node)
        and "example_value" not in node.meta
        and _is_ours(node.args[0])
    )


def _is_view(node: fx.Node) -> bool:
    name = called_name(node)
    return name in (
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "getitem",
        "unsqueeze",
        "squeeze",
        "detach",
    )


class _Piece(nn.Module):
    """One piece of the rest, compiled by inductor when it is first called."""

    def __init__(self, graph_module: nn.Module, mode: str | None) -> None:
        super().__init__()
        self.compiled = torch.compile(graph_module, backend="inductor", mode=mode)

    def forward(self, *args: Any) -> Any:
        return self.compiled(*args)
