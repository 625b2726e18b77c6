"""Fused nodes and small restructured models with spoiled tensors, each beside the plain thing: what fuzz_boundary.py runs."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bnrestructure
from bnrestructure import ops
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.core.memory_format import in_channels_last

__all__ = ["Case", "model_case", "node_case"]

Results = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """Two ways to the same results. ``without_memory``: there is nothing behind a tensor, and the fused way must say so."""

    name: str
    fused: Callable[[], Results]
    plain: Callable[[], Results]
    without_memory: bool
    tolerance: float


# --- spoiling a tensor -------------------------------------------------------------------------------------------------


def _as_dtype(t: Tensor, rng: random.Random) -> Tensor:
    return t.to(rng.choice([torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]))


def _expanded(t: Tensor, rng: random.Random) -> Tensor:
    return t.narrow(rng.randrange(t.dim()), 0, 1).expand(t.shape) if t.dim() and t.numel() else t


def _overlapping(t: Tensor, rng: random.Random) -> Tensor:
    strides = [rng.randrange(4) for _ in t.shape]
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True)) if t.numel() else 1
    return torch.randn(reach).to(t.dtype).as_strided(t.shape, strides)


def _with_gaps(t: Tensor, rng: random.Random) -> Tensor:
    wider = t.new_zeros([n * 2 for n in t.shape])
    view = wider[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _permuted(t: Tensor, rng: random.Random) -> Tensor:
    if 1 in t.shape:  # PyTorch's own convolution misreads some strides of such weights
        return t
    order = rng.sample(range(t.dim()), t.dim())
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


def _negated(t: Tensor, rng: random.Random) -> Tensor:
    """The same numbers, each of which has the other sign in memory: so PyTorch gives the imaginary part of a conjugate."""
    return t if t.dtype is torch.bool else torch._neg_view(t.neg())


def _resized(t: Tensor, rng: random.Random) -> Tensor:
    """Another size in one dimension, zero at times."""
    sizes = list(t.shape)
    if sizes:
        dim = rng.randrange(len(sizes))
        sizes[dim] = rng.choice([0, 1, max(0, sizes[dim] - 1), sizes[dim] + 1])
    return torch.randn(sizes).to(t.dtype)


def _of_other_dimensions(t: Tensor, rng: random.Random) -> Tensor:
    grows = rng.random() < 0.5 or not t.numel() or not t.dim()
    return t.unsqueeze(rng.randrange(t.dim() + 1)) if grows else t.select(rng.randrange(t.dim()), 0).clone()


def _on_meta(t: Tensor, rng: random.Random) -> Tensor:
    return t.to("meta")


def _cut(t: Tensor, rng: random.Random) -> Tensor:
    """A tensor whose storage somebody made shorter."""
    cut = t.clone(memory_format=torch.preserve_format)
    if cut.numel():
        cut.untyped_storage().resize_(rng.randrange(cut.untyped_storage().nbytes()))
    return cut


#: What leaves every tensor readable, and what takes the memory away.
_SPOILS = (_as_dtype, _expanded, _overlapping, _with_gaps, _permuted, _negated, _resized, _of_other_dimensions)
_WITHOUT_MEMORY = (_on_meta, _cut)


def _spoil(tensors: dict[str, Tensor], rng: random.Random) -> tuple[str, bool]:
    """Spoil one of the tensors, in place of it; (what was done, whether memory is missing now)."""
    name = rng.choice(sorted(tensors))
    is_read = tensors[name].numel() and not name.endswith("tracked")  # nobody reads the memory of a count of batches
    away = is_read and rng.random() < 0.2
    way = rng.choice(_WITHOUT_MEMORY if away else _SPOILS)
    with torch.no_grad():
        tensors[name] = way(tensors[name].detach(), rng)
    return f"{name}{way.__name__}", way in _WITHOUT_MEMORY


# --- nodes -------------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A node's tensors by name, and what to do with them on a backend; the first output is differentiated."""

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[dict[str, Tensor], str], tuple[Any, ...]]


def _vectors(c: int, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}mean": torch.randn(c) * 0.3, f"{prefix}scale": torch.rand(c) + 0.5, f"{prefix}beta": torch.randn(c) * 0.3}


def _activation(shape: tuple[int, ...], rng: random.Random) -> Tensor:
    x = torch.randn(shape)
    return in_channels_last(x) if rng.random() < 0.8 else x


def _conv_node(rng: random.Random) -> _Node:
    spatial = rng.choice([2, 2, 2, 2, 1, 3])
    groups = rng.choice([1, 1, 1, 2, 4])
    c, out = 4, 8 if groups < 4 else 4
    likely = (1, 1, 3), (1, 1, 2), (0, 1), (1, 1, 2)
    kernel, stride, padding, dilation = (tuple(rng.choice(values) for _ in range(spatial)) for values in likely)
    if rng.random() < 0.05:  # geometries that PyTorch refuses
        stride, padding, dilation, groups = rng.choice(
            [((0,) * spatial, padding, dilation, groups), (stride, (-1,) * spatial, dilation, groups),
             (stride, padding, (0,) * spatial, groups), (stride, padding, dilation, 3), (stride, padding, dilation, 0)]
        )  # fmt: skip
    shape = (rng.choice([1, 2]), c, *(rng.choice([3, 4, 5]) for _ in range(spatial)))
    tensors = {"x": _activation(shape, rng), "weight": torch.randn(out, max(1, c // max(groups, 1)), *kernel)}
    if rng.random() < 0.7:
        tensors |= _vectors(c)
    if rng.random() < 0.3:
        tensors["bias"] = torch.randn(out)
    joined = "mean" in tensors and rng.random() < 0.25
    if joined:
        tensors["r"] = _activation(shape, rng)
        if rng.random() < 0.5:
            tensors |= _vectors(c, "r_")
    elif rng.random() < 0.2:
        tensors["gate"] = torch.rand(shape[0], c, *[1] * spatial)
    act = rng.choice(["identity", "relu", "relu", "silu", "hardswish"])
    statistics, chain = rng.random() < 0.7, rng.random() < 0.3

    def run(t: dict[str, Tensor], backend: str) -> tuple[Any, ...]:
        transform = Transform(t.get("mean"), t.get("scale"), t.get("beta"), act, t.get("gate"))
        shortcut = ops.Shortcut(t["r"], t.get("r_mean"), t.get("r_scale"), t.get("r_beta")) if "r" in t else None
        found = ops.conv(
            t["x"], transform, t["weight"], t.get("bias"), ConvGeometry(stride, padding, dilation, groups),
            statistics=statistics, chain=chain, shortcut=shortcut, backend=backend,
        )  # fmt: skip
        return found.y, found.mean, found.var, found.passed

    return _Node(f"conv{spatial}d", tensors, run)


def _sweep_node(rng: random.Random) -> _Node:
    c = 4
    shape = (rng.choice([1, 2]), c, *(rng.choice([2, 3, 5]) for _ in range(rng.choice([2, 2, 2, 1, 3]))))
    act = rng.choice(["identity", "relu", "silu"])
    kind = rng.choice(["normalise", "residual", "statistics", "squeeze", "max_pool"])
    if kind == "max_pool" and act == "silu":  # PyTorch rounds it by place: of two equal pixels another one may be the largest
        act = "relu"
    tensors = {"x": _activation(shape, rng)} | (_vectors(c) if kind != "statistics" else {})
    if kind == "residual":
        tensors["r"] = _activation(shape, rng)
        if rng.random() < 0.5:
            tensors |= _vectors(c, "r_")
    elif kind == "normalise":
        if rng.random() < 0.4:
            tensors["factor"] = torch.rand(shape[0], *[1] * (len(shape) - 1)).round() * 1.25
        if rng.random() < 0.3:
            tensors["r"] = _activation(shape, rng)
        if rng.random() < 0.2 and "factor" not in tensors:  # with both PyTorch multiplies, and reads in backward whatever is there by then
            tensors["gate"] = torch.rand(shape[0], c, *[1] * (len(shape) - 2))
    chain = rng.random() < 0.3
    window = PoolGeometry((2, 2), (rng.choice([1, 2]),) * 2, (rng.choice([0, 1]),) * 2, rng.random() < 0.3)
    statistics = rng.random() < 0.5

    def run(t: dict[str, Tensor], backend: str) -> tuple[Any, ...]:
        if kind == "statistics":
            found = ops.statistics(t["x"], backend=backend)
            return found.mean, found.var
        x, transform = t["x"], Transform(t["mean"], t["scale"], t["beta"], act)
        if kind == "normalise":
            transform = transform._replace(gate=t.get("gate"))
            z, passed, _ = ops.normalise(x, transform, t.get("r"), factor=t.get("factor"), chain=chain, backend=backend)
            return z, passed
        if kind == "squeeze":
            return ops.squeeze(x, transform, backend=backend)
        if kind == "max_pool":
            return ops.max_pool(x, transform, window, backend=backend)
        r_transform = Transform(t.get("r_mean"), t.get("r_scale"), t.get("r_beta"))
        joined = ops.residual(x, transform, t["r"], r_transform, act=act, statistics=statistics, backend=backend)
        return joined.out, joined.mean, joined.var

    return _Node(kind, tensors, run)


def _finalize_node(rng: random.Random) -> _Node:
    c, more, chain = 4, rng.choice([0, 3]), rng.random() < 0.5
    tensors = {"mean": torch.randn(c), "var": torch.rand(c)}
    tensors |= {"behind_mean": torch.randn(more), "behind_var": torch.rand(more)} if more else {}
    c += more
    tensors |= {"weight": torch.rand(c) + 0.5, "bias": torch.randn(c)}
    tensors |= {"running_mean": torch.zeros(c), "running_var": torch.ones(c), "tracked": torch.tensor(1)}
    momentum, eps = rng.choice([0.1, None]), rng.choice([1e-5, 1e-3, 0.0])

    def run(t: dict[str, Tensor], backend: str) -> tuple[Any, ...]:
        running = [t[key].clone() if _owned(t[key]) else t[key] for key in ("running_mean", "running_var")]
        size = torch.Size((2, c, 3, 3))
        found = ops.finalize(
            t["mean"], t["var"], size, t["weight"], t["bias"], ops.Running(*running, t["tracked"].clone()), momentum, eps,
            more=ops.More(t.get("behind_mean"), t.get("behind_var")), chain=chain, backend=backend,
        )  # fmt: skip
        return *found[1:], *running

    return _Node("finalize", tensors, run)


def _owned(t: Tensor) -> bool:
    """Whether t's elements can be copied."""
    return t.device.type == "cpu" and t.untyped_storage().nbytes() >= (t.storage_offset() + t.numel()) * t.itemsize


def _change(t: Tensor, rng: random.Random) -> bool:
    """Change a saved tensor behind autograd's back; whether its memory was taken away."""
    if rng.random() < 0.5 and t.numel():
        t.untyped_storage().resize_(rng.randrange(t.untyped_storage().nbytes()))
        return True
    other = rng.choice([_resized, _with_gaps, _expanded, _overlapping])(t.detach(), rng)
    t.data = other
    return False


def node_case(rng: random.Random) -> Case:
    """A node of ``ops``, spoiled before forward or between forward and backward, on the compiled kernels and on the reference."""
    node = rng.choice([_conv_node, _conv_node, _sweep_node, _sweep_node, _finalize_node])(rng)
    names, missing = [node.name], False
    if rng.random() < 0.25 and node.name != "finalize":
        names.append("bfloat16")
        for key in {"x", "weight", "r", "bias", "factor", "gate"} & node.tensors.keys():
            node.tensors[key] = node.tensors[key].bfloat16()
    changed = rng.choice(sorted(node.tensors)) if rng.random() < 0.3 else None
    for _ in range(rng.choice([0, 1, 1, 1, 2]) if changed is None else 0):
        name, without = _spoil(node.tensors, rng)
        names.append(name)
        if without:  # nothing can be done to it again
            missing = True
            break
    if changed is not None:
        names.append(f"{changed} changed before backward")
    wanting = {key: rng.random() < 0.8 for key in sorted(node.tensors)}
    seed = rng.randrange(2**31)
    takes_away = changed is not None and _change(node.tensors[changed].clone(), random.Random(seed))

    def run(backend: str) -> Results:
        torch.manual_seed(seed)
        leaves = {}
        for key, t in node.tensors.items():
            mine = t.clone(memory_format=torch.preserve_format) if changed is not None else t.detach()
            floating = t.is_floating_point() and not key.startswith(("running", "factor"))  # a factor is drawn, not learnt
            leaves[key] = mine.requires_grad_() if floating and wanting[key] else mine
        found = node.run(leaves, backend)
        results: Results = [t for t in found if isinstance(t, Tensor)]
        outputs = [t for t in results if t is not None and t.requires_grad]
        inputs = [t for t in leaves.values() if t.requires_grad]
        if not outputs or not inputs:
            return results
        # Readers of a tensor that is passed through accumulate into the gradient they get.
        gradients = [torch.randn(t.shape).to(t.dtype) if t is found[-1] else _gradient(t, random.Random(seed)) for t in outputs]
        kept: Results = [None if t is None else t.detach().clone() for t in results]
        if changed is not None:
            _change(leaves[changed], random.Random(seed))
        return [*kept, *torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)]

    tolerance = 0.1 if any(t.dtype in (torch.bfloat16, torch.float16) for t in node.tensors.values()) else 1e-4
    if takes_away:  # a kernel that does not read it does without, and PyTorch's own read what is not theirs
        return Case(" ".join(names), lambda: outcome_only(lambda: run("cpu")), list, False, tolerance)
    return Case(" ".join(names), lambda: run("cpu"), lambda: run("reference"), missing, tolerance)


def outcome_only(run: Callable[[], Results]) -> Results:
    """Nothing, whatever becomes of it."""
    with contextlib.suppress(Exception):  # the case asks only that the process survives
        run()
    return []


def _gradient(t: Tensor, rng: random.Random) -> Tensor:
    """A gradient for an output, at times with the strides of a sum's, or of a buffer's slice, or with the negative bit."""
    if not t.is_floating_point():
        return t
    g = torch.randn(t.shape).to(t.dtype)
    way = rng.random()
    if way < 0.2 and t.numel():
        return _expanded(g, rng)
    if way < 0.4:
        return _with_gaps(g, rng)
    return _negated(g, rng) if way < 0.5 else g


# --- models ------------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn2, self.out = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        return self.out(torch.relu(x + self.bn2(self.b(torch.relu(self.bn1(self.a(x)))))))


class _Signal(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU())


_MODELS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {}


def _pair(name: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """(a model, the same restructured, the size of its input): made once a process."""
    if name not in _MODELS:
        made, size = (_Residual(), (2, 3, 6, 6)) if name == "residual" else (_Signal(), (2, 3, 9))
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.randn(p.shape) * 0.5)
        fused = bnrestructure.restructure(copy.deepcopy(made), backend="cpu")
        fused(torch.randn(size))
        _MODELS[name] = made, fused, size
    return _MODELS[name]


def model_case(rng: random.Random) -> Case:
    """A training step of a model with one or two parameters, buffers or inputs spoiled, restructured and as it was."""
    plain, fused, size = _pair(rng.choice(["residual", "signal"]))
    state = {key: t.detach().clone() for key, t in plain.state_dict(keep_vars=True).items()}
    tensors = {"input": torch.randn(size), **state}
    names, missing = ["model"], False
    for _ in range(rng.choice([1, 1, 2])):
        name, without = _spoil(tensors, rng)
        names.append(name)
        if without:
            missing = True
            break
    cotangents = rng.randrange(2**31)
    # The variance of an expanded input is zero but for rounding, so only what is wrong as a whole can be told.

    def step(model: nn.Module) -> Results:
        original = {key: t.data for key, t in model.state_dict(keep_vars=True).items()}
        try:
            for key, t in model.state_dict(keep_vars=True).items():
                t.grad = None
                # A buffer is not a Parameter: what is spoiled in device or dtype can only be put in its place.
                _replace(model, key, tensors[key] if missing else tensors[key].clone(memory_format=torch.preserve_format))
            out = model(tensors["input"])
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(cotangents)).to(out.dtype))
            return [out.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]
        finally:
            for key, t in original.items():
                _replace(model, key, t)

    return Case(" ".join(names), lambda: step(fused), lambda: step(plain), missing, 0.1)


def _replace(model: nn.Module, key: str, value: Tensor) -> None:
    owner, _, name = key.rpartition(".")
    module: Any = model.get_submodule(owner)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[name] = value
