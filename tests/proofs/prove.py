"""What a proof is here: an original and a rewritten program run on expressions, and everything that comes out of them is the same.

The original's gradients are taken from its outputs' expressions by reverse.py, so from definitions alone. The rewritten program's come out
of PyTorch's autograd with the project's own backward functions. :func:`planted` puts an error into one of the project's functions.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy as sp
import torch
from algebra import Level, NotProved, expanded
from channel_runs import runs
from pass_tools import make_pass, site_graph
from reverse import gradients
from symbolic import Symbolic
from torch import Tensor, fx, nn

__all__ = ["EPS", "IMAGES", "MOMENTUM", "adopt", "after_passes", "edited", "planted", "prove", "prove_module", "symbolic"]

IMAGES = 1009
#: Numbers that stand for batch norm's parameters of these names: as symbols, for any value.
EPS, MOMENTUM = 0.0123456789, 0.1357911


def symbolic(images: int = IMAGES, *, defined: bool = True) -> Symbolic:
    """A mode with symbols for eps and momentum; ``defined``: means and variances spelt out as sums."""
    m = sp.Symbol("momentum")
    return Symbolic(images, {EPS: sp.Symbol("eps", positive=True), MOMENTUM: m, 1 - MOMENTUM: 1 - m}, defined=defined)


def prove(
    s: Symbolic,
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    inputs: Sequence[Tensor],
    buffers: Callable[[], Sequence[Tensor]] = lambda: (),
    *,
    whole: bool = False,
) -> None:
    """Raise NotProved unless both programs give the same outputs, the same gradients at ``inputs`` and leave the same ``buffers``.

    ``buffers`` puts fresh ones in place, each time it is called, and returns them. A ``whole`` program must leave alone the gradients that
    it is given; a node may add to that of a threaded tensor.
    """
    written = buffers()
    with torch.no_grad():
        expected = _tensors(original(*inputs))
    expected_buffers = [s.read(b) for b in written]
    written = buffers()
    found = _tensors(rewritten(*inputs))
    if len(expected) != len(found):
        raise NotProved(f"{len(found)} outputs instead of {len(expected)}")
    outputs, seeds = [], []
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one.shape != other.shape:
            raise NotProved(f"output {i} is {tuple(other.shape)} instead of {tuple(one.shape)}")
        _compare(s, f"output {i}", s.read(one), s.read(other))
        level = s._level(one.shape)
        space = s.space(one.shape) if level is Level.PIXEL else None
        value = s.read(one)
        parts = {f"P{i}_{j}_{len(s.algebra.atoms)}": n or one.shape[1] for j, (n, _) in enumerate(value)}
        seed = s.segmented(parts, *one.shape, grad=False)
        seeds.append(seed)
        outputs += [(e, p, level, space) for (_, e), (_, p) in zip(value, s.read(seed), strict=True)]
    for i, (buffer, value) in enumerate(zip(written, expected_buffers, strict=True)):
        _compare(s, f"buffer {i}", value, s.read(buffer))
    wanted = [x for x in inputs if x.requires_grad]
    leaves = [e for x in wanted for _, e in s.read(x)]
    truth = gradients(s.algebra, outputs, leaves)
    given = [s.read(seed) for seed in seeds]
    differentiable = [(y, p) for y, p in zip(found, seeds, strict=True) if y.requires_grad]
    claimed = torch.autograd.grad(
        [y for y, _ in differentiable], wanted, [p for _, p in differentiable], allow_unused=True
    )
    for i, (seed, before) in enumerate(zip(seeds, given, strict=True)):
        if whole and s.read(seed) != before:
            raise NotProved(f"the gradient of output {i} is the caller's, and was written to")
    for x, gradient in zip(wanted, claimed, strict=True):
        value = s.read(x)
        zero = tuple((n, sp.Integer(0)) for n, _ in value)
        name = ", ".join(str(e) for _, e in value)
        _compare(s, f"the gradient at {name}", tuple((n, truth[e]) for n, e in value), zero if gradient is None else s.read(gradient))


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def _compare(s: Symbolic, what: str, expected: Any, found: Any) -> None:
    for _, (one, other) in runs([expected, found]):
        if not s.algebra.is_zero(one - other):
            raise NotProved(
                f"{what} should be\n{s.algebra.explained(expanded(one))}\nand is\n{s.algebra.explained(expanded(other))}"
            )


def adopt(
    s: Symbolic, modules: Sequence[nn.Module], concats: dict[int, tuple[int, ...]] | None = None
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Put unknowns in the places of the parameters of ``modules``, which have the same names; (those, what renews the buffers).

    ``concats`` says of each width that only concats have what segments they consist of: vectors of that many channels do likewise.
    """

    def unknown(name: str, like: Tensor, grad: bool) -> Tensor:
        widths = (concats or {}).get(like.shape[0] if like.dim() == 1 else 0, ())
        if widths:
            return s.segmented({f"{name}_{i}": n for i, n in enumerate(widths)}, *like.shape, grad=grad)
        return s.tensor(name, *like.shape, dtype=like.dtype, grad=grad)

    made = {name: unknown(name, parameter, True) for name, parameter in modules[0].named_parameters()}
    for module in modules:
        for name, tensor in made.items():
            path, _, own = name.rpartition(".")
            module.get_submodule(path)._parameters[own] = tensor

    def renew() -> list[Tensor]:
        fresh = {name: unknown(name, buffer, False) for name, buffer in modules[0].named_buffers()}
        for module in modules:
            for name, tensor in fresh.items():
                path, _, own = name.rpartition(".")
                module.get_submodule(path)._buffers[own] = tensor
        return list(fresh.values())

    return list(made.values()), renew


def prove_module(
    original: nn.Module,
    rewritten: nn.Module,
    shape: Sequence[int],
    *,
    concats: dict[int, tuple[int, ...]] | None = None,
    s: Symbolic | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """:func:`prove` of two modules with the same parameters and buffers, for one input of this shape (its first size is N)."""
    s = s or symbolic(defined=False)
    with s.running():
        x = s.tensor("x", *shape, dtype=dtype)
        parameters, renew = adopt(s, [original, rewritten], concats)
        prove(s, lambda x, *_: original(x), lambda x, *_: rewritten(x), [x, *parameters], renew, whole=True)


def after_passes(model: nn.Module, names: Sequence[str]) -> fx.GraphModule:
    """A copy of the model, captured and rewritten by these passes, every fused node on the reference kernels."""
    gm = site_graph(copy.deepcopy(model))
    for name in names:
        make_pass(name)(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and "backend" in _parameters(node.target):
            node.kwargs = {**node.kwargs, "backend": "reference"}
    gm.recompile()
    return gm


def _parameters(function: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in function
        return []


@contextmanager
def planted(name: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the project's function ``name`` (or ``Class.method``), wherever it is known under that name, by ``wrong(function)``.

    Of the implementations of the kernels it is the reference's; ``place:name`` is the one of a module with ``place`` in its name.
    """
    place, _, first = name.rpartition(":")
    first, _, method = first.partition(".")
    modules = [m for n, m in sys.modules.items() if n.partition(".")[0] == "bnrestructure" and m is not None]
    holders: list[Any] = [m for m in modules if callable(vars(m).get(first)) and _is_at(place, vars(m)[first].__module__)]
    assert len({id(vars(m)[first]) for m in holders}) == 1, f"not one function is called {name}"
    if method:
        holders = [vars(holders[0])[first]]
    kept = [(holder, vars(holder)[method or first]) for holder in holders]
    tables = {id(table): table for m in modules for n, table in vars(m).items() if n == "RUN"}.values()  # of kernels, by call
    answers = [(table, call) for table in tables for call, function in table.items() if function is kept[0][1]]
    found = kept[0][1].__func__ if isinstance(kept[0][1], staticmethod) else kept[0][1]
    replacement = wrong(found)
    try:
        for holder, before in kept:
            setattr(holder, method or first, staticmethod(replacement) if isinstance(before, staticmethod) else replacement)
        for table, call in answers:
            table[call] = replacement
        yield
    finally:
        for table, call in answers:
            table[call] = kept[0][1]
        for holder, before in kept:
            setattr(holder, method or first, before)


def _is_at(place: str, module: str) -> bool:
    of_a_device = module.startswith(tuple(f"bnrestructure.kernels.{name}" for name in ("cpu", "cuda", "folded")))
    return place in module if place else not of_a_device


def edited(old: str, new: str) -> Callable[[Any], Any]:
    """What makes of a function the one whose source has ``new`` in the place of ``old``."""

    def wrong(function: Any) -> Any:
        source = textwrap.dedent(inspect.getsource(function))
        source = "from __future__ import annotations\n" + source[source.index("def ") :]  # without decorators
        tree = ast.parse(source).body[-1]
        assert isinstance(tree, ast.FunctionDef)
        lines = source.splitlines(keepends=True)
        first = tree.body[1 if ast.get_docstring(tree) else 0].lineno - 1
        head, body = "".join(lines[:first]), "".join(lines[first:])
        assert body.count(old) == 1, f"{function.__qualname__} has {old!r} {body.count(old)} times"
        made: dict[str, Any] = {}
        exec(compile(head + body.replace(old, new), f"<{function.__name__} with an error>", "exec"), function.__globals__, made)
        return made[function.__name__]

    return wrong
