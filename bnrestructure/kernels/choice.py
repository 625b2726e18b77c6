"""The choice among a device's implementations of the convolution node: as measured on this machine, or by the device's rule.

A backward pass may take its two products from different implementations. What a device brings: the implementations, and a :class:`Rule`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels import join, tuning
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult, Kernels

__all__ = ["BACKWARD", "Alternatives", "Choice", "Convolutions", "Implementation", "Node", "Rule", "Site", "call_of"]

#: The candidates for a dense backward pass: the implementation of the input gradient and of the weight gradient. Where only one
#: of them is needed, or both are the same, the name has one word.
BACKWARD = {
    "fused": ("fused", "fused"),
    "hybrid": ("hybrid", "hybrid"),
    "fused dgrad, hybrid wgrad": ("fused", "hybrid"),
    "hybrid dgrad, fused wgrad": ("hybrid", "fused"),
}

_MOST_SITES = 4096


class Choice(NamedTuple):
    """``implementation`` is "fused", "hybrid" or what else a device has; for a backward pass it may be one of ``BACKWARD``."""

    implementation: str
    reason: str


class Node(NamedTuple):
    """What the choice depends on. ``x`` and ``weight`` are shapes, ``dtype`` is what is computed in.

    ``joined``: x is a residual join's sum, formed and differentiated with the convolution (then ``transformed`` is False). ``machine``:
    what else a time depends on in this process, in words: an instruction set and a number of threads, say.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: ConvGeometry
    dtype: torch.dtype
    transformed: bool
    gated: bool = False
    joined: bool = False
    machine: str = ""

    @property
    def size_out(self) -> tuple[int, ...]:
        """(OH, OW)."""
        return self.geometry.output_size(self.x[2:], self.weight[2:])


class Alternatives(NamedTuple):
    """What may answer a product, for those who choose by proofs and times.

    node       its node's name in the file of measurements
    names      the candidates
    chosen     the one that answers now
    measured   whether it is chosen by a measurement
    decides    whether this call's times are the node's: those of a backward pass with one of its gradients are not
    """

    node: str
    names: tuple[str, ...]
    chosen: str
    measured: bool
    decides: bool


class Rule(Protocol):
    """What a device knows of its implementations without having measured them."""

    #: What calls begin with in the file of measurements.
    prefix: str

    def machine(self, dtype: torch.dtype) -> str:
        """What times of this dtype depend on in this process, in words."""

    def state(self) -> Hashable:
        """What :meth:`machine` depends on, and fast to ask for."""

    def unsupported(self, call: ConvForward | ConvBackward) -> str | None:
        """Why no implementation can answer the call, or None."""

    def candidates(self, node: Node, direction: str) -> list[str]:
        """The implementations that can run the node, the one that needs the least memory first."""

    def choose(self, node: Node, direction: str) -> Choice:
        """The choice where nothing was measured."""

    def identify(self, device: torch.device) -> None:
        """Tell kernels/tuning.py what machine the device is."""

    def timer(self, x: Tensor) -> Callable[[Callable[[], Any]], float]:
        """A clock for work on x's device."""

    def prepared(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """The run in the form in which it is timed: a replay that the host asks for at once, where the device has such a thing."""


class Implementation(Protocol):
    """A way to run the convolution node. ``site`` is where calls of these sizes and kinds keep what they have in common."""

    #: Whether its dgrad finishes a residual join's gradient.
    finishes_join: bool

    def forms_sum(self, node: Node) -> bool:
        """Whether its forward pass forms a residual join's sum itself."""

    def forward(self, call: ConvForward, site: Site) -> ConvResult:
        """The result."""

    def backward(self, call: ConvBackward, site: Site) -> ConvGradients:
        """The gradients."""


class Site:
    """Calls that have sizes, strides and kinds of arguments in common: what was chosen for them, and an implementation's notes."""

    __slots__ = ("backward", "forward", "generation", "node", "notes", "unsupported")

    forward: Callable[[ConvForward, Site], ConvResult]
    backward: Callable[[ConvBackward, Site], ConvGradients]

    def __init__(self, node: Node, unsupported: str | None) -> None:
        self.node, self.unsupported = node, unsupported
        self.generation = -1
        self.notes: Any = None


def call_of(node: Node, direction: str, prefix: str) -> str:
    """The node's name in the file of measurements: all that its time depends on, as far as it knows."""
    (n, c, h, w), (out, _, kh, kw) = node.x, node.weight
    stride, padding, dilation, groups = node.geometry
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    details = ", ".join(f"{name} {'x'.join(map(str, pair))}" for name, pair in pairs.items())
    how = ("transformed" if node.transformed else "as it is") + (", gated" if node.gated else "") + (", joined" if node.joined else "")
    dtype = str(node.dtype).removeprefix("torch.")
    return f"{prefix} {direction} {dtype} {n}x{c}x{h}x{w} {how}, to {out} by {kh}x{kw}, {details}, groups {groups}, {node.machine}"


class Convolutions:
    """A device's convolution nodes. ``kernels`` are the device's, of which residual joins and sweeps are asked.

    ``halves`` names the implementations of the input's and of the weight's gradient for each backward candidate.
    """

    def __init__(
        self, kernels: Kernels, rule: Rule, implementations: Mapping[str, Implementation], halves: Mapping[str, tuple[str, str]]
    ) -> None:
        self.kernels, self.rule, self.implementations, self.halves = kernels, rule, implementations, halves
        self._sites: dict[Hashable, Site] = {}

    def forward(self, call: ConvForward) -> ConvResult:
        """The call's result by what was chosen for it."""
        site = self.site(call)
        if site.unsupported is not None:
            raise UnsupportedCallError(site.unsupported)
        return site.forward(call, site)

    def backward(self, call: ConvBackward) -> ConvGradients:
        """The call's gradients by what was chosen for it."""
        site = self.site(call)
        if site.unsupported is not None:
            raise UnsupportedCallError(site.unsupported)
        return site.backward(call, site)

    def site(self, call: ConvForward | ConvBackward) -> Site:
        """Where calls like this one belong."""
        x, weight, t, of_join = call.x, call.weight, call.transform, call.join
        key = (
            x.get_device(), x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, call.geometry, call.dtype,
            t.act, t.mean is None, t.gate is None, of_join and (of_join.y.dtype, of_join.r.dtype, of_join.act), self.rule.state(),
        )  # fmt: skip
        site = self._sites.get(key)
        if site is None:
            site = Site(self.node_of(call), self.rule.unsupported(call))
            if len(self._sites) >= _MOST_SITES:
                self._sites.clear()
            self._sites[key] = site
        if site.generation != tuning.generation:
            self._settle(site, x.device)
        return site

    def choose(self, node: Node, direction: str, device: torch.device) -> Choice:
        """The choice for ``direction`` "forward" or "backward" on this device, and why."""
        if (found := self._measured(node, direction, device)) is not None:
            return Choice(found.choice, found.reason)
        return self.rule.choose(node, direction)

    def alternatives(self, call: ConvForward | ConvBackward, device: torch.device) -> Alternatives:
        """What may answer a call on this device, by the sizes and dtypes of its tensors."""
        node, direction = self.node_of(call), "backward" if isinstance(call, ConvBackward) else "forward"
        measured = self._measured(node, direction, device) is not None
        chosen = self.choose(node, direction, device).implementation
        name, names = call_of(node, direction, self.rule.prefix), tuple(self.rule.candidates(node, direction))
        return Alternatives(name, names, chosen, measured, isinstance(call, ConvForward) or (call.needs[0] and call.needs[1]))

    def node_of(self, call: ConvForward | ConvBackward) -> Node:
        """What the choice for this call depends on."""
        t, joined = call.transform, call.join is not None
        shapes = tuple(call.x.shape), tuple(call.weight.shape)
        return Node(*shapes, call.geometry, call.dtype, not t.is_identity, t.gate is not None, joined, self.rule.machine(call.dtype))

    def choices(self, call: ConvForward) -> tuple[Choice, Choice]:
        """(forward, backward): what a convolution like this one will run, and why; its tensors may be on the meta device.

        ``reference`` where no kernel here can. Backward is meant with both the input's and the weight's gradient wanted.
        """
        x, weight, geometry, device = call.x, call.weight, call.geometry, call.x.device
        size = geometry.output_size(x.shape[2:], weight.shape[2:])
        dy = torch.empty(x.shape[0], weight.shape[0], *size, dtype=call.dtype, device="meta")
        backward = ConvBackward(dy, BackwardEdge(), x, call.transform, weight, geometry, call.dtype, join=call.join)
        node, found = self.node_of(call), []
        for direction, one in (("forward", call), ("backward", backward)):
            reason = self.kernels.supports(one)
            found.append(self.choose(node, direction, device) if reason is None else Choice("reference", reason))
        return found[0], found[1]

    def by(self, name: str) -> OneOf:
        """The candidate of this name alone, for tests and benchmarks."""
        return OneOf(self, name)

    # --- by one implementation -----------------------------------------------------------------------------------------

    def run_forward(self, name: str, call: ConvForward, site: Site) -> ConvResult:
        """The call's result by the implementation of this name."""
        implementation = self.implementations[name]
        if call.join is not None and not implementation.forms_sum(site.node):
            return join.forward_in_turn(self.kernels, partial(implementation.forward, site=site), call)
        return implementation.forward(call, site)

    def run_backward(self, name: str, call: ConvBackward, site: Site) -> ConvGradients:
        """The call's gradients by the candidate of this name."""
        dgrad, wgrad = self.halves[name]
        need_x, need_weight, need_bias = call.needs
        if not need_x:
            dgrad = wgrad
        elif not (need_weight or need_bias):
            wgrad = dgrad
        if dgrad == wgrad:
            return self._half(dgrad, call, site)
        weights = replace(call, needs=(False, need_weight, need_bias), accumulate=None, join=None)
        found = self.implementations[wgrad].backward(weights, site)
        inputs = self._half(dgrad, replace(call, needs=(True, False, False)), site)
        return inputs._replace(weight=found.weight, bias=found.bias)

    def _half(self, name: str, call: ConvBackward, site: Site) -> ConvGradients:
        implementation = self.implementations[name]
        if call.join is not None and call.needs[0] and not implementation.finishes_join:
            return join.backward_in_turn(self.kernels, partial(implementation.backward, site=site), call)
        return implementation.backward(call, site)

    # --- what was chosen -----------------------------------------------------------------------------------------------

    def _settle(self, site: Site, device: torch.device) -> None:
        """Make the choices for a site: it is new, or there are new measurements, or measuring begins or ends."""
        generation = tuning.generation
        if site.unsupported is None:
            self._choose_for(site, device)
        site.generation = generation  # at the end: another thread takes the site to be settled then

    def _choose_for(self, site: Site, device: torch.device) -> None:
        site.node = site.node._replace(machine=self.rule.machine(site.node.dtype))
        if tuning.is_measuring():
            site.forward, site.backward = self._measure_forward, self._measure_backward
            return
        forward, backward = (self.choose(site.node, direction, device).implementation for direction in ("forward", "backward"))
        chosen = self.implementations[forward]
        direct = not site.node.joined or chosen.forms_sum(site.node)
        site.forward = chosen.forward if direct else partial(self.run_forward, forward)
        dgrad, wgrad = self.halves[backward]
        whole = dgrad == wgrad and (not site.node.joined or self.implementations[dgrad].finishes_join)
        site.backward = self.implementations[dgrad].backward if whole else partial(self.run_backward, backward)

    def _measured(self, node: Node, direction: str, device: torch.device) -> tuning.Measurement | None:
        self.rule.identify(device)
        call = call_of(node, direction, self.rule.prefix)
        found = tuning.measured(call)
        if found is None or found.choice in self.rule.candidates(node, direction):
            return found
        tuning.discard(call)
        warnings.warn(f"bnrestructure: a measurement names the unknown kernel {found.choice!r} and is ignored: {call}", stacklevel=2)
        return None

    def _measure_forward(self, call: ConvForward, site: Site) -> ConvResult:
        self._measure(site, "forward", call.x, lambda name: partial(self.run_forward, name, call, site))
        return self.run_forward(self.choose(site.node, "forward", call.x.device).implementation, call, site)

    def _measure_backward(self, call: ConvBackward, site: Site) -> ConvGradients:
        if call.needs[0] and call.needs[1]:
            # A tensor to add to that many times, with the strides of the real one and nobody's gradient.
            into = None if call.accumulate is None else torch.empty_like(call.accumulate).copy_(call.accumulate)
            trial = replace(call, accumulate=into)
            self._measure(site, "backward", call.x, lambda name: partial(self.run_backward, name, trial, site))
        return self.run_backward(self.choose(site.node, "backward", call.x.device).implementation, call, site)

    def _measure(self, site: Site, direction: str, x: Tensor, run_of: Callable[[str], Callable[[], Any]]) -> None:
        """Time the node's candidates on these very arguments, unless nodes of this size were timed before."""
        if self._measured(site.node, direction, x.device) is None:
            candidates = {name: run_of(name) for name in self.rule.candidates(site.node, direction)}
            tuning.measure(call_of(site.node, direction, self.rule.prefix), candidates, self.rule.timer(x))


class OneOf:
    """Convolution nodes by one candidate, whatever was chosen."""

    def __init__(self, convolutions: Convolutions, name: str) -> None:
        self._convolutions, self._name = convolutions, name

    def run(self, call: ConvForward | ConvBackward) -> Any:
        """The call's result."""
        of = self._convolutions
        run: Any = of.run_forward if isinstance(call, ConvForward) else of.run_backward
        return run(self._name, call, of.site(call))
