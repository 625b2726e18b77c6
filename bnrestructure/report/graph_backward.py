"""What each node's backward does, in the words of the two edge formulas."""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.ir import (
    AvgPool,
    ConcatBuffer,
    Conv,
    Link,
    MaxPool,
    Normalise,
    Reader,
    Residual,
    Squeeze,
    Statistics,
    fused_of,
    is_fused,
)
from bnrestructure.graph.view import Fused
from bnrestructure.report.names import shortened

__all__ = ["backward_of"]

Words = dict[str, str | None]

_WORK = {
    Normalise: "sweep", MaxPool: "scatter to the maxima", AvgPool: "spread the averages", Squeeze: "spread the average",
}  # fmt: skip


def backward_of(node: fx.Node, normalises: list[str], statistics: list[str], group: str) -> Words:
    """``prologue`` (how the incoming gradient is read), ``work``, ``epilogue`` (what happens to the outgoing one)."""
    if node.op in ("placeholder", "output"):
        return _words(None, "gradient of the input" if node.op == "placeholder" else "gradient of the loss", None)
    view = fused_of(node)
    if view is None or not is_fused(node):
        return _words(None, "autograd's own", None)
    read = shortened(normalises, group)
    made = shortened(statistics, group)
    match view:
        case Conv():
            return _conv(view, read, made)
        case Residual():
            edge = f"dY = P + a*(y - mean) + b of {made}" if made else None
            return _words(edge, _operands(view), f"SP, SPY of {read}" if read else None)  # one sweep
        case Statistics():
            return _words(None, f"a*(y - mean) + b of {made}", _adds(view))
        case ConcatBuffer():
            return _words(None, "hands down its slice of the gradient", None)
    return _words(None, _WORK.get(type(view), "copy the gradient"), _mask_and_sums(view, read))


def _words(prologue: str | None, work: str, epilogue: str | None) -> Words:
    return {"prologue": prologue, "work": work, "epilogue": epilogue}


def _conv(conv: Conv, read: str, made: str) -> Words:
    """wgrad and dgrad; BN's terms for y in the prologue, the mask and sums of the input's BN in the epilogue."""
    edge = None
    if made:
        edge = f"dY = {'s*P' if conv.gain else 'P'} + a*(y - mean) + b of {made}"
    elif conv.gain:
        edge = "dY = s*P"
    if conv.forms_residual:  # the gradient of the residual is completed, masked and summed where it arises
        added = "the other readers' gradient added, " if conv.chain else ""
        return _words(edge, "wgrad, dgrad", f"{added}{_operands(conv)}{f', SP, SPY of {read}' if read else ''}")
    work = "wgrad, dgrad if the input needs one" if conv.x.op == "placeholder" else "wgrad, dgrad"
    return _words(edge, work, _mask_and_sums(conv, read))


def _mask_and_sums(view: Fused, read: str) -> str | None:
    if isinstance(view, Conv | Normalise) and view.gate is not None:
        return "gate's gradient"
    act = view.act if isinstance(view, Reader) else "identity"
    parts = [f"{act}' mask" if act != "identity" else None, f"SP, SPY of {read}" if read else None, _adds(view)]
    return ", ".join(part for part in parts if part is not None) or None


def _adds(view: Fused) -> str | None:
    return "added in place to the other readers' gradient" if isinstance(view, Link) and view.chain else None


def _operands(view: Residual | Conv) -> str:
    """What the operands of a residual get: one gradient G where y is added as it is, or its convolution applies its own s."""
    mask = "" if view.act == "identity" else f"{view.act}' mask, "
    if view.gate is not None:
        return f"{mask}G*gate and G, gate's gradient"
    gain = view.gain if isinstance(view, Residual) else view.x_gain
    return f"{mask}one G for both operands" if view.mean is None or gain is not None else f"{mask}s*G and G"
