"""The verifier rejects, by name, graphs that were broken by hand: each rule one way at least, and every rule."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pass_tools import after
from small_models import build, input_for
from torch import Tensor, fx, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.core.errors import BNRestructureError, BrokenGraphError
from bnrestructure.graph.ir import (
    ConcatBuffer,
    Conv,
    Finalize,
    MaxPool,
    Normalise,
    OwnGradient,
    Residual,
    Squeeze,
    Statistics,
)
from bnrestructure.graph.provenance import remember
from bnrestructure.graph.verify import RULES, verify, violations
from bnrestructure.passes.pipeline import PASSES


class _Net(nn.Module):
    """Convolutions of 4 channels, each with a batch norm; a function of the module and its input is the forward."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.halved = nn.ModuleList(nn.Conv2d(2, 4, 1) for _ in range(2))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def layer(self, i: int, x: Tensor) -> Tensor:
        """A convolution and its batch norm."""
        return self.bn[i](self.conv[i](x))


def _read_thrice(m: Any, x: Tensor) -> Any:
    """Two links, and a reader that is none of ours."""
    y = m.conv[0](x)
    return m.layer(1, y), m.layer(2, y), torch.tanh(y)


def _shortcut_with_another_reader(m: Any, x: Tensor) -> Any:
    """A residual whose branch is not computed from the other reader of its shortcut."""
    y = m.conv[0](x)
    return m.layer(1, y), m.layer(2, x) + y


def _plain_shortcut_with_another_reader(m: Any, x: Tensor) -> Any:
    """A sum without a batch norm before it, whose branch is not computed from the other reader of its shortcut."""
    y = m.conv[0](x)
    return m.layer(1, y), m.bn[2](m.conv[2](x) + y)


def _activated_branch(m: Any, x: Tensor) -> Any:
    """Darknet's bottleneck, with two readers of its input before it."""
    y = m.conv[0](x)
    return m.layer(2, y), y + torch.relu(m.layer(1, y))


def _two_slots(m: Any, x: Tensor) -> Any:
    """A concat of two activated branches, and of a convolution's result that a link reads, too."""
    y = m.conv[0](x)
    return torch.cat([F.silu(m.layer(1, y)), y, F.gelu(m.layer(2, y))], 1)


def _graph(model: str | Callable[[Any, Tensor], Any], upto: str) -> fx.Graph:
    """The graph of a small model, or of a body, after the passes up to this one."""
    net = build(model) if isinstance(model, str) else _Net(model)
    return after(net, *PASSES[: PASSES.index(upto) + 1]).graph


@dataclass(frozen=True)
class Case:
    """A graph, what is done to it, the rule that it then breaks, and the words that say how."""

    rule: str
    model: str | Callable[[Any, Tensor], Any]
    upto: str
    spoil: Callable[[fx.Graph], fx.Node]  # returns the node to blame
    says: str


def _late(graph: fx.Graph) -> fx.Node:
    finalize = Finalize.every(graph)[0]
    graph.output_node().prepend(finalize.node)
    return min(finalize.outs().values())


def _foreign(graph: fx.Graph) -> fx.Node:
    other = fx.Graph().placeholder("elsewhere")
    statistics = Statistics.every(graph)[0]
    return statistics.update(x=other).node


def _twice(graph: fx.Graph) -> fx.Node:
    first, second, *_ = Finalize.every(graph)
    remember(second.node, site="bn1")
    remember(first.node, site="bn1")
    return second.node


def _changed(graph: fx.Graph) -> fx.Node:
    conv = Conv.every(graph)[0]
    remember(conv.node, changed_by="relu_")
    return conv.node


def _without(name: str) -> Callable[[fx.Graph], fx.Node]:
    def spoil(graph: fx.Graph) -> fx.Node:
        node = Conv.every(graph)[0].node
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != name}
        return node

    return spoil


def _with(**keywords: Any) -> Callable[[fx.Graph], fx.Node]:
    def spoil(graph: fx.Graph) -> fx.Node:
        node = Conv.every(graph)[0].node
        node.kwargs = {**node.kwargs, **keywords}
        return node

    return spoil


def _by_position(graph: fx.Graph) -> fx.Node:
    statistics = Statistics.every(graph)[0]
    statistics.node.args = (statistics.x,)
    statistics.node.kwargs = {}
    return statistics.node


def _size_as_a_node(graph: fx.Graph) -> fx.Node:
    conv = Conv.every(graph)[0]
    return conv.update(groups=conv.x).node


def _at_once(graph: fx.Graph) -> fx.Node:
    conv = Conv.every(graph)[0]
    with graph.inserting_before(graph.output_node()):
        graph.call_function(len, (conv.node,))
    return conv.node


def _double(graph: fx.Graph) -> fx.Node:
    conv = Conv.every(graph)[0]
    y = conv.out("y")
    with graph.inserting_after(y):
        graph.node_copy(y, lambda node: node)
    return conv.node


def _updated(view: Any, index: int = 0, **changes: Any) -> Callable[[fx.Graph], fx.Node]:
    """The nth node of a kind with other fields."""
    return lambda graph: view.every(graph)[index].update(**changes).node


def _forgetful(view: Any, **forgotten: Any) -> Callable[[fx.Graph], fx.Node]:
    def spoil(graph: fx.Graph) -> fx.Node:
        node: fx.Node = view.every(graph)[0].node
        remember(node, **forgotten)
        return node

    return spoil


def _another_beta(graph: fx.Graph) -> fx.Node:
    first, second = Normalise.every(graph)[:2]
    return second.update(beta=first.beta).node


def _halves(m: Any, x: Tensor) -> Any:
    """A normalised tensor in halves, each read by a convolution."""
    one, other = m.layer(1, x).chunk(2, 1)
    return m.halved[0](one), m.halved[1](other)


def _another_part(graph: fx.Graph) -> fx.Node:
    """A convolution's vectors are those of the other half."""
    one, other = (conv for conv in Conv.every(graph) if conv.mean is not None)
    return other.update(mean=one.mean, scale=one.scale, beta=one.beta).node


def _part_of_the_mean(graph: fx.Graph) -> fx.Node:
    one, other = (conv for conv in Conv.every(graph) if conv.mean is not None)
    return other.update(mean=one.mean).node


def _mean_of_statistics(graph: fx.Graph) -> fx.Node:
    finalize, normalise = Finalize.every(graph)[0], Normalise.every(graph)[0]
    return normalise.update(mean=finalize.mean).node


def _mean_of_statistics_in_a_concat(graph: fx.Graph) -> fx.Node:
    reader = next(r for kind in (Normalise, Conv) for r in kind.every(graph) if r.mean is not None and r.mean.target is torch.cat)
    assert reader.mean is not None
    first, *others = reader.mean.all_input_nodes
    made = Finalize.making(first, "mean")
    assert made is not None
    reader.mean.args = ([made.mean, *others],)
    return reader.node


def _another_site(graph: fx.Graph) -> fx.Node:
    first, second = Normalise.every(graph)[:2]
    return second.update(mean=first.mean, scale=first.scale, beta=first.beta).node


def _no_scale(graph: fx.Graph) -> fx.Node:
    normalise = Normalise.every(graph)[0]
    return normalise.update(scale=normalise.mean).node


def _swapped(graph: fx.Graph) -> fx.Node:
    finalize = Finalize.every(graph)[0]
    return finalize.update(mean=finalize.var, var=finalize.mean).node


def _handed_on_unasked(graph: fx.Graph) -> fx.Node:
    return next(finalize for finalize in Finalize.every(graph) if finalize.chain).update(chain=False).node


def _second_reader_of_statistics(graph: fx.Graph) -> fx.Node:
    conv = next(conv for conv in Conv.every(graph) if conv.statistics == "unmerged")
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.relu, (conv.out("mean"),))
    return conv.node


def _merged_into_others(graph: fx.Graph) -> fx.Node:
    finalize = next(finalize for finalize in Finalize.every(graph) if finalize.behind_mean is not None and finalize.unmerged is not None)
    finalize.update(mean=finalize.behind_mean, behind_mean=finalize.mean, var=finalize.behind_var, behind_var=finalize.var)
    assert finalize.unmerged is not None
    return finalize.unmerged.args[0]  # type: ignore[return-value]


def _swapped_behind(graph: fx.Graph) -> fx.Node:
    finalize = next(finalize for finalize in Finalize.every(graph) if finalize.behind_mean is not None)
    return finalize.update(var=finalize.behind_var, behind_var=finalize.var).node


def _another_size(graph: fx.Graph) -> fx.Node:
    first, second = Finalize.every(graph)[:2]
    return second.update(size=first.size).node


def _gate_elsewhere(graph: fx.Graph) -> fx.Node:
    gated = next(conv for conv in Conv.every(graph) if conv.gate is not None)
    free = next(conv for conv in Conv.every(graph) if conv.gate is None and conv.node > gated.gate)
    return free.update(gate=gated.gate).node


def _gated(**changes: Any) -> Callable[[fx.Graph], fx.Node]:
    def spoil(graph: fx.Graph) -> fx.Node:
        return next(conv for conv in Conv.every(graph) if conv.gate is not None).update(**changes).node

    return spoil


def _deferred_read_as_it_is(graph: fx.Graph) -> fx.Node:
    squeeze = next(squeeze for squeeze in Squeeze.every(graph) if squeeze.excite)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.relu, (squeeze.out("deferred"),))
    return squeeze.node


def _gaining(graph: fx.Graph) -> Conv:
    return next(conv for conv in Conv.every(graph) if conv.gain)


def _gain_dropped(graph: fx.Graph) -> fx.Node:
    conv = _gaining(graph)
    (residual,) = conv.out("gain").users
    view = Residual.of(residual)
    assert view is not None
    view.update(gain=None, r_gain=None)
    return conv.node


def _second_reader(graph: fx.Graph) -> fx.Node:
    conv = _gaining(graph)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.relu, (conv.out("y"),))
    return conv.node


def _gain_of_nobody(graph: fx.Graph) -> fx.Node:
    residual = Residual.every(graph)[0]
    return residual.update(gain=residual.scale).node


def _unread_chain(graph: fx.Graph) -> fx.Node:
    conv = next(conv for conv in Conv.every(graph) if not conv.chain)
    return conv.update(chain=True).node


def _second_link(graph: fx.Graph) -> fx.Node:
    link = next(conv for conv in Conv.every(graph) if conv.chain)
    other = next(conv for conv in Conv.every(graph) if conv.x is link.outs()["passed"])
    other.update(x=link.x, chain=True)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.relu, (other.out("passed"),))
        graph.call_function(torch.relu, (link.out("passed"),))
    return link.node


def _without_own_gradient(graph: fx.Graph) -> fx.Node:
    own = OwnGradient.every(graph)[0]
    own.node.replace_all_uses_with(own.x)
    graph.erase_node(own.node)
    return own.x.args[0]  # type: ignore[return-value]


def _shared_again(graph: fx.Graph) -> fx.Node:
    residual = Residual.every(graph)[0]
    producer = Conv.making(residual.y, "y")
    assert producer is not None
    assert not producer.gain, "the pass has seen that the gradient cannot be shared"
    return residual.update(gain=producer.update(gain=True).out("gain")).node


def _sum_of_a_view(graph: fx.Graph) -> fx.Node:
    residual = next(residual for residual in Residual.every(graph) if residual.mean is None)
    with graph.inserting_before(residual.node):
        view = graph.call_method("view_as", (residual.y, residual.r))
    return residual.update(y=view).node


def _copied_too_late(graph: fx.Graph) -> fx.Node:
    """A copy of the gradient for y is made when autograd comes to it: the links behind the shortcut may have been there before."""
    (residual,) = [residual for residual in Residual.every(graph) if residual.mean is None]
    shortcut = OwnGradient.of(residual.r)
    assert shortcut is not None, "the pass has seen that the gradient cannot be shared"
    made = OwnGradient.create(after=residual.y, x=residual.y)
    return residual.update(y=made.node, r=shortcut.x).node


def _shortcut_alone(graph: fx.Graph) -> fx.Node:
    residual = next(residual for residual in Residual.every(graph) if residual.mean is None)
    finalize = Finalize.every(graph)[0]
    return residual.update(**{f"r_{name}": finalize.out(name) for name in ("mean", "scale", "beta")}).node


def _link_at_a_shared_gradient(graph: fx.Graph) -> fx.Node:
    """The other reader of what an activated branch adds becomes a link whose gradient is the sum's."""
    (adding,) = [normalise for normalise in Normalise.every(graph) if normalise.r is not None]
    own = OwnGradient.of(adding.r)
    assert own is not None, "the pass has seen that the gradient is the result's"
    return next(conv for conv in Conv.every(graph) if conv.outs().get("passed") is adding.update(r=own.x).r).node


def _two_writers(graph: fx.Graph) -> fx.Node:
    (buffer,) = ConcatBuffer.every(graph)
    first = next(conv for conv in Conv.every(graph) if conv.appends)
    ConcatBuffer.create(before=graph.output_node(), x=first.x, into=first.into, offset=8)
    return buffer.node


def _moved(graph: fx.Graph) -> fx.Node:
    writer = next(conv for conv in Conv.every(graph) if conv.in_buffer and conv.into is not None)
    writer.update(offset=1)
    return next(conv for conv in Conv.every(graph) if conv.channels is not None).node


def _moved_slot(graph: fx.Graph) -> fx.Node:
    first, second = Normalise.every(graph)
    second.update(offset=2)
    return first.node


def _shared_slice(graph: fx.Graph) -> fx.Node:
    (buffer,) = ConcatBuffer.every(graph)
    buffer.update(own=False)
    links = [view.node for kind in (Conv, Statistics) for view in kind.every(graph) if view.chain]
    return max(links)


def _read_too_early(graph: fx.Graph) -> fx.Node:
    first = next(conv for conv in Conv.every(graph) if conv.channels is not None)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.relu, (first.out("y"),))
    return first.node


def _two_owners(graph: fx.Graph) -> fx.Node:
    first, second = Statistics.every(graph)[:2]
    site = Finalize.every(graph)[0]
    remember(second.node, statistics_of=("bn1", "bn2"))
    assert first.node is not second.node
    return site.node


CASES = [
    Case("order", "chain", "fission", _late, "not computed before"),
    Case("order", "chain", "fission", _foreign, "in this graph"),
    Case("sites", "chain", "fission", _twice, "is the batch norm bn1, too"),
    Case("plain memory", "chain", "fuse-statistics", _changed, "relu_ changes"),
    Case("arguments", "chain", "fuse-statistics", _without("weight"), "has no weight"),
    Case("arguments", "chain", "fuse-statistics", _with(slope=0.1), "takes no slope"),
    Case("arguments", "chain", "fuse-statistics", _with(weight=1.0), "weight is 1.0 and should be a node"),
    Case("arguments", "chain", "fuse-statistics", _size_as_a_node, "groups is a node and should be a value"),
    Case("arguments", "chain", "fission", _by_position, "by keyword"),
    Case("outputs", "chain", "fuse-statistics", _at_once, "all of its outputs at once"),
    Case("outputs", "chain", "fuse-statistics", _double, "two nodes"),
    Case("asked for", "chain", "fuse-statistics", _updated(Conv, statistics=False), "its output mean is read"),
    Case("asked for", "dense", "share-statistics", _handed_on_unasked, "its output passed_mean is read"),
    Case("asked for", "residual", "chain-readers", _updated(Conv, 1, chain=False), "its output passed is read"),
    Case("asked for", _two_slots, "eliminate-concat", _updated(Normalise, channels=None, visible=None), "its output buffer is read"),
    Case("activation", "chain", "fuse-normalise", _updated(Conv, 1, act="tanh"), "unknown activation 'tanh'"),
    Case("place in a buffer", "chain", "fuse-statistics", _updated(Conv, offset=None), "appends to no buffer"),
    Case("place in a buffer", "dense", "eliminate-concat", _updated(ConcatBuffer, channels=40), "of what is to come"),
    Case("remembers its halves", "chain", "fission", _forgetful(Normalise, normalises=()), "normalises for no site"),
    Case("remembers its halves", "chain", "fission", _forgetful(Statistics, statistics_of=()), "statistics of no site"),
    Case("remembers its halves", "chain", "fission", _forgetful(Finalize, site=None), "does not remember its site"),
    Case("whole edge", "chain", "fission", _updated(Normalise, beta=None), "some of mean, scale and beta"),
    Case("whole edge", "chain", "fuse-normalise", _updated(Conv, 1, scale=None), "and not all"),
    Case("one batch norm", "chain", "fission", _another_beta, "of different batch norms"),
    Case("one batch norm", "chain", "fission", _mean_of_statistics, "of different batch norms"),
    Case("one batch norm", "inception", "fuse-normalise", _mean_of_statistics_in_a_concat, "of different batch norms"),
    Case("one batch norm", _halves, "fuse-normalise", _another_part, "is not of the channels that it normalises"),
    Case("one batch norm", _halves, "fuse-normalise", _part_of_the_mean, "of different batch norms"),
    Case("one batch norm", "chain", "fission", _another_site, "does not remember it"),
    Case("one batch norm", "chain", "fission", _no_scale, "is not the scale"),
    Case("one tensor", "chain", "fission", _swapped, "is no node's"),
    Case("unmerged", "chain", "select-kernels", _second_reader_of_statistics, "are not merged"),
    Case("unmerged", "dense", "select-kernels", _merged_into_others, "merges them into others"),
    Case("asked for", "chain", "select-kernels", _updated(Conv, statistics=True), "its output unmerged is read"),
    Case("one tensor", "dense", "share-statistics", _swapped_behind, "different tensors"),
    Case("one tensor", "chain", "fission", _another_size, "is not the size"),
    Case("gate", "squeeze_excite", "fuse-normalise", _gated(gate=None), "without a gate"),
    Case("gate", "squeeze_excite", "fuse-normalise", _gated(act="identity"), "not the squeeze's"),
    Case("gate", "squeeze_excite", "fuse-normalise", _gate_elsewhere, "no squeeze defers"),
    Case("deferred", "squeeze_excite", "fuse-normalise", _deferred_read_as_it_is, "normalise or residual with a gate"),
    Case("gain", "residual", "fuse-residual", _gain_dropped, "not one residual gives"),
    Case("gain", "residual", "fuse-residual", _second_reader, "others read its y"),
    Case("gain given", _shortcut_with_another_reader, "chain-readers", _gain_of_nobody, "is not the gain of the convolution"),
    Case("chain", "residual", "fuse-residual", _unread_chain, "nobody reads what it passes on"),
    Case("chain", "inception", "chain-readers", _second_link, "are both links at"),
    Case("own gradient", _read_thrice, "chain-readers", _without_own_gradient, "may have handed it to others"),
    Case("shared gradient", _shortcut_with_another_reader, "chain-readers", _shared_again, "may not have read it yet"),
    Case("shared gradient", _plain_shortcut_with_another_reader, "chain-readers", _copied_too_late, "may hand on the gradient"),
    Case("shared gradient", "preact", "fuse-residual", _sum_of_a_view, "may hand on the gradient"),
    Case("own gradient", _two_slots, "eliminate-concat", _shared_slice, "may have handed it to others"),
    Case("own gradient", _activated_branch, "chain-readers", _link_at_a_shared_gradient, "may have handed it to others"),
    Case("whole edge", "preact", "fuse-residual", _shortcut_alone, "in its shortcut, and none in its branch"),
    Case("one writer", "dense", "eliminate-concat", _two_writers, "both write behind it"),
    Case("extent", "dense", "eliminate-concat", _updated(ConcatBuffer, extra=1), "of a buffer of"),
    Case("extent", "inception", "eliminate-concat", _moved, "writes over channels of"),
    Case("extent", _two_slots, "eliminate-concat", _moved_slot, "writes over channels of"),
    Case("unfinished buffer", "inception", "eliminate-concat", _read_too_early, "reads it before"),
    Case("owners", "chain", "fission", _two_owners, "taken by 2 nodes"),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}: {case.says}" for case in CASES])
def test_a_graph_broken_by_hand_is_rejected_by_name(case: Case) -> None:
    graph = _graph(case.model, case.upto)
    verify(graph, case.upto)
    blamed = case.spoil(graph)
    with pytest.raises(BrokenGraphError) as caught:
        verify(graph, "a pass")
    error = caught.value
    assert (error.pass_name, error.node, error.rule) == ("a pass", blamed.name, case.rule), error
    assert case.says in str(error)
    assert str(error).startswith(f"after a pass, node {blamed.name} breaks the rule {case.rule!r}: ")


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {case.rule for case in CASES} == set(RULES)
    assert len(RULES) >= 15


def test_the_error_is_ours_and_can_be_sent_to_another_process() -> None:
    error = BrokenGraphError("fission", "conv", "gain", "it does not pair")
    assert isinstance(error, BNRestructureError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_all_that_is_broken_is_listed() -> None:
    graph = _graph("chain", "fission")
    for normalise in Normalise.every(graph):
        normalise.update(act="tanh")
    assert [violation.rule for violation in violations(graph)] == ["activation", "activation"]


def test_a_pass_that_breaks_a_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnrestructure.passes import fission

    monkeypatch.setattr(fission, "remember", lambda node, **changes: None)
    with pytest.raises(BrokenGraphError, match="after fission, node statistics breaks the rule 'remembers its halves'"):
        _graph("chain", "fission")


def test_a_broken_graph_never_reaches_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module runs as it was, the warning and the plan say why."""
    from bnrestructure.passes import fission

    monkeypatch.setattr(fission, "remember", lambda node, **changes: None)
    model, x = build("chain"), input_for("chain")
    expected = copy.deepcopy(model)(x)
    restructured = bnrestructure.restructure(model, backend="reference")
    with pytest.warns(UserWarning, match="after fission.*Please report this fault; .* runs as it was"):
        assert torch.equal(restructured(x), expected)
    assert any("after fission" in note for note in bnrestructure.explain(restructured).notes)


def test_a_pool_is_verified_like_a_convolution() -> None:
    graph = _graph("residual", "fuse-normalise")
    pool = MaxPool.every(graph)[0].update(scale=None)
    with pytest.raises(BrokenGraphError, match=f"node {pool.node.name} breaks the rule 'whole edge'"):
        verify(graph, "a pass")


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(torch.cat([x, y, torch.cat([x, y], 1)], 1))


def test_a_concat_of_the_same_statistics_twice_is_no_single_tensors() -> None:
    verify(after(_Twice(), *PASSES).graph, "all passes")
