"""What each node's backward does, in the words of the two edge formulas."""

from __future__ import annotations

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused
from bnrestructure.report.names import shortened

__all__ = ["backward_of"]

Words = dict[str, str | None]


def backward_of(node: fx.Node, normalises: list[str], statistics: list[str], group: str) -> Words:
    """``prologue`` (how the incoming gradient is read), ``work``, ``epilogue`` (what happens to the outgoing one)."""
    if node.op in ("placeholder", "output"):
        return _words(None, "gradient of the input" if node.op == "placeholder" else "gradient of the loss", None)
    if not is_fused(node):
        return _words(None, "autograd's own", None)
    read = shortened(normalises, group)
    made = shortened(statistics, group)
    if node.target is ops.conv:
        return _conv(node, read, made)
    if node.target is ops.residual:
        return _residual(node, read, made)
    if node.target is ops.statistics:
        return _words(None, f"a*(y - mean) + b of {made}", _adds(node))
    if node.target is ops.concat_buffer:
        return _words(None, "hands down its slice of the gradient", None)
    work = {
        ops.normalise: "sweep", ops.max_pool: "scatter to the maxima", ops.avg_pool: "spread the averages",
        ops.squeeze: "spread the average",
    }  # fmt: skip
    return _words(None, work.get(node.target, "copy the gradient"), _mask_and_sums(node, read))  # type: ignore[arg-type]


def _words(prologue: str | None, work: str, epilogue: str | None) -> Words:
    return {"prologue": prologue, "work": work, "epilogue": epilogue}


def _conv(node: fx.Node, read: str, made: str) -> Words:
    """wgrad and dgrad; BN's terms for y in the prologue, the mask and sums of the input's BN in the epilogue."""
    edge = None
    if made:
        edge = f"dY = {'s*P' if node.kwargs['gain'] else 'P'} + a*(y - mean) + b of {made}"
    elif node.kwargs["gain"]:
        edge = "dY = s*P"
    if node.kwargs.get("r") is not None:
        return _words(edge, "wgrad, dgrad", _join_epilogue(node, read))
    first = isinstance(node.kwargs["x"], fx.Node) and node.kwargs["x"].op == "placeholder"
    return _words(edge, "wgrad, dgrad if the input needs one" if first else "wgrad, dgrad", _mask_and_sums(node, read))


def _mask_and_sums(node: fx.Node, read: str) -> str | None:
    act = str(node.kwargs.get("act", "identity"))
    parts = []
    if node.kwargs.get("gate") is not None:
        return "gate's gradient"
    if act != "identity":
        parts.append(f"{act}' mask")
    if read:
        parts.append(f"SP, SPY of {read}")
    added = _adds(node)
    return ", ".join([*parts, added] if added else parts) or None


def _adds(node: fx.Node) -> str | None:
    return "added in place to the other readers' gradient" if node.kwargs.get("thread") else None


def _residual(node: fx.Node, read: str, made: str) -> Words:
    """One sweep: both operands share the gradient G where the convolutions apply their own s."""
    edge = f"dY = P + a*(y - mean) + b of {made}" if made else None
    return _words(edge, _operands(node, "gain"), f"SP, SPY of {read}")


def _join_epilogue(node: fx.Node, read: str) -> str:
    """The dgrad of a convolution that forms a join: its gradient completed, masked and summed where it arises."""
    added = "the other readers' gradient added, " if node.kwargs["thread"] else ""
    return f"{added}{_operands(node, 'x_gain')}, SP, SPY of {read}"


def _operands(node: fx.Node, gain: str) -> str:
    act = str(node.kwargs["act"])
    mask = "" if act == "identity" else f"{act}' mask, "
    return f"{mask}one G for both operands" if node.kwargs[gain] is not None else f"{mask}s*G and G"
