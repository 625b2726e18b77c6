"""PyTorch programs run on expressions instead of numbers, in the dispatcher: the project's own code, unmodified, and PyTorch's autograd.

A tensor is a FakeTensor of large prime sizes, and beside its storage stands what it holds: an expression of the algebra for each range of
channels. Views, aliases of one storage, writes in place and slices of a concat's buffer therefore mean what they mean to PyTorch. Numbers
that code computes from sizes (2 / M, M / (M - 1)) are known again by their value: sizes are so large that it can be no accident.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import sympy as sp
import torch
from algebra import Algebra, Level, NotProved, expanded
from channel_runs import Value
from meanings import MEANINGS, VIEWS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Symbolic"]


@dataclass
class _Memory:
    """A storage: expressions by range of channels [start, stop), in order."""

    ranges: list[tuple[int, int, sp.Expr]] = field(default_factory=list)
    everywhere: sp.Expr | None = None

    @property
    def is_constant(self) -> bool:
        return not any(expression.free_symbols for _, _, expression in self.ranges) and self.everywhere is None

    def read(self, start: int, channels: int) -> Value:
        if self.everywhere is not None:
            return ((0, self.everywhere),)
        found = []
        for first, stop, expression in self.ranges:
            if first < start + channels and stop > start:
                if (first < start or stop > start + channels) and expression.free_symbols:
                    raise NotProved(f"channels {start} to {start + channels} are a part of what was written as {first} to {stop}")
                found.append((min(stop, start + channels) - max(first, start), expression))
        if sum(n for n, _ in found) != channels:
            raise NotProved(f"channels {start} to {start + channels} are read before they were written")
        if not found:
            raise NotProved("nothing is known of all channels")
        return tuple(found)

    def write(self, start: int, channels: int, value: Value) -> None:
        if channels == 0:
            self.everywhere = _only(value)
            return
        self.everywhere = None
        kept = []
        for first, stop, expression in self.ranges:
            if first < start + channels and stop > start:
                if (first < start or stop > start + channels) and expression.free_symbols:
                    raise NotProved(f"a write to channels {start} to {start + channels} splits {first} to {stop}")
                kept += [(a, b, expression) for a, b in ((first, start), (start + channels, stop)) if first <= a < b <= stop]
            else:
                kept.append((first, stop, expression))
        for n, expression in value:
            kept.append((start, start + (n or channels), expression))
            start += n
        self.ranges = sorted(kept, key=lambda entry: entry[0])


def _only(value: Value) -> sp.Expr:
    if len(value) != 1:
        raise NotProved("one expression is wanted of a tensor of several runs of channels")
    return value[0][1]


class Symbolic(TorchDispatchMode):
    """Everything inside ``with Symbolic() as s:`` runs on expressions.

    ``images`` is N. Channel counts and sizes of images must be told apart by their value: :meth:`tensor` takes note of them. ``named``
    are numbers that stand for symbols: {0.123: eps}.
    """

    def __init__(self, images: int = 1009, named: dict[float, sp.Expr] | None = None, *, defined: bool = True) -> None:
        super().__init__()
        self.algebra = Algebra(defined)
        self.images = images
        self.named = dict(named or {})
        self.spaces: dict[int, sp.Symbol] = {}
        #: Numbers known to lie in [0, divisor), by divisor: what max pooling's index arithmetic rests on.
        self.remainders: defaultdict[int, list[sp.Expr]] = defaultdict(list)
        #: What was pooled, and how, by the expression of the place of its maxima.
        self.places: dict[sp.Expr, tuple[Value, Any]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._memories: dict[int, _Memory] = {}
        self._alive: list[Any] = []  # storages are known by their addresses: none may be used again

    @contextmanager
    def running(self) -> Iterator[Symbolic]:
        """Run what is inside on expressions."""
        with warnings.catch_warnings(), self._fake, self:
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # only to see that there are two
            yield self

    # --- making and reading tensors ------------------------------------------------------------------------------------------------

    def tensor(
        self, name: str | sp.Expr, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, last: bool = True
    ) -> Tensor:
        """An unknown called ``name``, or a given expression: [N, C, *spatial] (channels_last if ``last``), [N, C], [C], or a weight."""
        with self._fake:
            made = torch.empty(shape, dtype=dtype)
            if last and len(shape) > 2 and shape[0] == self.images:
                made = torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)
        if isinstance(name, str):
            level = self._level(shape)
            expression: sp.Expr = self.algebra.leaf(name, level, self.space(shape) if level is Level.PIXEL else None)
        else:
            expression = name
        self.write(made, self.uniform(made, expression))
        return made.requires_grad_(grad)

    def segmented(self, parts: dict[str, int], *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
        """The same with an unknown for each run of channels: ``parts`` gives their names and widths."""
        made = self.tensor(sp.Integer(0), *shape, dtype=dtype, grad=False)
        level = self._level(shape)
        space = self.space(shape) if level is Level.PIXEL else None
        self.write(made, tuple((n, self.algebra.leaf(name, level, space)) for name, n in parts.items()))
        return made.requires_grad_(grad)

    def expression(self, x: Tensor) -> sp.Expr:
        """What a tensor of one run of channels holds."""
        return _only(self.read(x))

    def read(self, x: Tensor) -> Value:
        """What a tensor holds."""
        start, channels = self._range(x)
        memory = self._memories.get(x.untyped_storage()._cdata)
        if memory is None:
            raise NotProved(f"a tensor {tuple(x.shape)} of unknown origin is read")
        dim = self.channel_dim(x)
        expanded_channel = dim is not None and x.shape[dim] > 1 and x.stride(dim) == 0
        if channels == 0 and (x.numel() == 1 or expanded_channel) and memory.everywhere is None:  # one element of a vector
            start, channels = x.storage_offset(), 1
        value = memory.read(start, channels)
        return ((0, value[0][1]),) if channels == 1 else value  # it may meet any number of channels

    def write(self, x: Tensor, value: Value) -> None:
        """Let a tensor hold this."""
        storage = x.untyped_storage()
        self._alive.append(storage)
        start, channels = self._range(x)
        self._memories.setdefault(storage._cdata, _Memory()).write(start, channels, value)

    def uniform(self, x: Tensor, expression: sp.Expr) -> Value:
        """The value of a tensor like x that holds one expression."""
        return ((self._range(x)[1], expanded(expression)),)

    def space(self, shape: Sequence[int]) -> sp.Symbol | None:
        """How many pixels an image of [N, C, *spatial] has: a symbol for each number, None for 1."""
        pixels = prod(shape[2:])
        if pixels == 1:
            return None
        if pixels not in self.spaces:
            for known in self.spaces:
                assert max(Fraction(pixels, known).as_integer_ratio()) > 64, f"{pixels} pixels could be taken for a part of {known}"
            self.spaces[pixels] = sp.Symbol(f"HW{len(self.spaces)}", positive=True)
        return self.spaces[pixels]

    def _level(self, shape: Sequence[int]) -> Level:
        if len(shape) < 2:
            return Level.CHANNEL if len(shape) == 1 and shape[0] != 1 else Level.NUMBER
        if shape[0] == self.images:
            return Level.PIXEL if len(shape) > 2 and prod(shape[2:]) > 1 else Level.IMAGE
        return Level.WEIGHT

    def channel_dim(self, x: Tensor) -> int | None:
        """Which dimension is the channels', or None of a weight or a number."""
        if x.dim() <= 1:
            return 0 if x.numel() != 1 else None
        if x.shape[0] not in (1, self.images):
            return None
        if x.dim() > 2 and prod(x.shape[1:-1]) in self.spaces and x.shape[0] != 1:
            return x.dim() - 1  # movedim(1, -1)
        return 1

    def _range(self, x: Tensor) -> tuple[int, int]:
        dim = self.channel_dim(x)
        if dim is None or not x.is_floating_point():  # an index is the same expression for every channel
            return 0, 0
        stride = x.stride(dim)
        if stride == 0:
            return 0, 0
        return x.storage_offset() // stride, x.shape[dim]

    # --- numbers -------------------------------------------------------------------------------------------------------------------

    def number(self, value: float) -> sp.Expr:
        """A Python number, with what it was computed from."""
        if isinstance(value, bool) or value in self.named:
            return self.named.get(value, sp.Integer(int(value)))
        exact = Fraction(value)
        n = self.algebra.images
        for pixels, symbol in ((1, sp.Integer(1)), *self.spaces.items()):
            m = self.images * pixels
            for known, expression in ((m, n * symbol), (pixels, symbol), (Fraction(m, m - 1), n * symbol / (n * symbol - 1))):
                for base, meaning in ((Fraction(known), expression), (1 / Fraction(known), 1 / expression)):
                    ratio = (exact / base).limit_denominator(16)
                    if 0 < abs(ratio.numerator) <= 64 and abs(exact / base / ratio - 1) < Fraction(1, 10**13):
                        return sp.Rational(ratio) * meaning
        short = exact.limit_denominator(1000)
        if abs(exact - short) <= abs(exact) / 2**52:
            return sp.Rational(short)
        return sp.Rational(exact)

    # --- running -------------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket.__name__
        if packet in ("device", "is_same_size", "sym_size", "sym_stride"):
            return func(*args, **kwargs)
        if packet in VIEWS:
            result = func(*args, **kwargs)
            self._check_view(packet, args[0], result)
            return result
        meaning = MEANINGS.get(packet.rstrip("_") if packet not in MEANINGS else packet)
        if meaning is None:
            raise NotProved(f"the algebra has no meaning for {func}")
        before = [self._operand(a) for a in args]
        result = func(*args, **kwargs)
        values = meaning(self, args, kwargs, before, result)
        if packet.endswith("_") or "out" in kwargs:
            result_tensors: Sequence[Any] = (result,)
        else:
            result_tensors = result if isinstance(result, (tuple, list)) else (result,)
        for tensor, value in zip(result_tensors, values, strict=True):
            if isinstance(tensor, Tensor) and value is not None:
                self.write(tensor, value)
        return result

    def _check_view(self, operator: str, x: Any, result: Any) -> None:
        """Of what shares x's memory all but the channels must be all there, or what x holds is not what it holds."""
        memory = self._memories.get(x.untyped_storage()._cdata) if isinstance(x, Tensor) else None
        if memory is None or memory.is_constant:
            return
        if operator == "as_strided" and x.dim() == 1 and x.numel() == result.numel():
            return  # a whole storage, of a tensor with the result's strides
        for view in result if isinstance(result, (tuple, list)) else (result,):
            shared = view.untyped_storage()._cdata == x.untyped_storage()._cdata and x.numel() and x.is_floating_point()
            if shared and self._pixels(view) != self._pixels(x):
                raise NotProved(f"{operator}: a view {tuple(view.shape)} of some pixels of {tuple(x.shape)}")

    def _pixels(self, x: Tensor) -> int:
        """How many different numbers each channel has."""
        dim = self.channel_dim(x)
        return prod(n for d, n in enumerate(x.shape) if d != dim and x.stride(d) != 0 and n != 1)

    def _operand(self, argument: Any) -> Any:
        """The value of a tensor argument, read before anything is overwritten; of a list, its members'; else None."""
        if isinstance(argument, Tensor):
            try:
                return self.read(argument)
            except NotProved as reason:
                return reason  # it may never be read
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return [self._operand(a) for a in argument]
        return None
