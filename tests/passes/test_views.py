"""Views of fused nodes say what the ops take, and are read and written without loss."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from pass_tools import after
from small_models import build

from bnrestructure import graph as graph_package
from bnrestructure import ops, passes, patterns, plan, report
from bnrestructure.core.edges import Transform
from bnrestructure.graph.ir import FUSED, OTHERS, Conv, Normalise, Statistics, fused_of, maker_of
from bnrestructure.graph.provenance import Provenance, carry, provenance, remember, take_halves
from bnrestructure.graph.view import Fused
from bnrestructure.passes.pipeline import PASSES

each_view = pytest.mark.parametrize("view", [*FUSED, *OTHERS])


@each_view
def test_fields_are_the_arguments_of_the_op(view: type[Fused]) -> None:
    """Under the op's names and with its defaults, the members of its tuples among them; outputs are the op's."""
    arguments = inspect.signature(view.op).parameters
    defaults = {name: argument.default for name, argument in arguments.items() if name not in view._grouped}
    left_out = set()
    for name, (make, prefix) in view._grouped.items():
        assert name in arguments
        members = {prefix + member: make._field_defaults.get(member, inspect.Parameter.empty) for member in make._fields}
        left_out |= members.keys()
        defaults = members | defaults
    own = {field.name: field for field in fields(view) if field.name != "node"}
    assert own.keys() <= defaults.keys()
    assert defaults.keys() - own.keys() <= left_out
    for name, field in own.items():
        if defaults[name] is not inspect.Parameter.empty:
            assert field.default in (MISSING, defaults[name]), f"{name} is not what the op takes for it: a view may only ask for more"
    returns: Any = inspect.signature(view.op, eval_str=True).return_annotation
    assert view.outputs == getattr(returns, "_fields", ())


def test_a_view_reads_and_writes_its_node() -> None:
    graph = after(build("chain"), "fission", "fuse-statistics").graph
    conv = Conv.every(graph)[0]
    assert (conv.statistics, conv.act, conv.offset, conv.mean) == (True, "identity", 0, None)
    changed = conv.update(act="relu", chain=True)
    assert (changed.act, changed.chain, changed.node) == ("relu", True, conv.node)
    assert (conv.act, conv.chain) == ("identity", False), "a view taken before keeps the old values"
    assert fused_of(conv.node).act == "relu"  # type: ignore[union-attr]
    assert Conv.of(conv.out("y")) is None
    assert Normalise.of(conv.node) is None
    assert maker_of(conv.out("y"))[1] == "y"
    assert Conv.making(conv.out("mean"), "mean").node is conv.node  # type: ignore[union-attr]
    assert Conv.making(conv.out("mean"), "y") is None


def test_members_of_a_tuple_are_fields() -> None:
    """A tuple of the call is there when one of its members differs from what the op takes for it."""
    graph = after(build("chain"), "fission").graph
    normalise = Normalise.every(graph)[0]
    assert normalise.node.kwargs["transform"] == Transform(normalise.mean, normalise.scale, normalise.beta)
    conv = after(build("chain"), *PASSES).graph
    made = next(view for view in Conv.every(conv) if view.mean is not None)
    assert made.times_read(made.mean) == 1
    assert "slot" not in made.node.kwargs
    assert made.update(channels=8).node.kwargs["slot"] == ops.Slot(channels=8)
    assert "slot" not in made.update(channels=None).node.kwargs
    with pytest.raises(TypeError, match="ConvGeometry needs stride, padding, dilation, groups"):
        Conv.create(before=made.node, x=made.x, weight=made.weight)


def test_what_the_op_does_not_take_stays_for_the_verifier_to_see() -> None:
    conv = Conv.every(after(build("chain"), "fission", "fuse-statistics").graph)[0]
    conv.node.kwargs = {**conv.node.kwargs, "slope": 0.1}
    assert conv.update(act="relu").node.kwargs["slope"] == 0.1
    conv.node.kwargs = {**conv.node.kwargs, "transform": (None,)}
    assert conv.update(chain=True).node.kwargs["transform"] == (None,)


def test_an_output_has_one_node_behind_the_others() -> None:
    graph = after(build("chain"), "fission", "fuse-statistics").graph
    conv = Conv.every(graph)[0]
    before = conv.last
    gain = conv.out("gain")
    assert conv.out("gain") is gain is conv.last
    assert before.next is gain
    assert gain.name == f"{conv.node.name}_gain"


def test_fields_that_are_not_there() -> None:
    graph = after(build("chain"), "fission").graph
    statistics = Statistics.every(graph)[0]
    with pytest.raises(TypeError, match="Statistics has no field act"):
        statistics.update(act="relu")
    with pytest.raises(TypeError, match="Statistics has no field threads, y"):
        Statistics.create(before=statistics.node, y=statistics.x, threads=True)
    assert len(Statistics.every(graph)) == 2


def test_a_node_that_is_erased_leaves_nothing() -> None:
    graph = after(build("chain"), "fission").graph
    count = len(graph.nodes)
    made = Statistics.create(before=graph.output_node(), x=Statistics.every(graph)[0].x)
    made.out("mean")
    made.erase_if_unread()
    assert len(graph.nodes) == count


def test_what_nodes_remember_is_carried_over() -> None:
    graph = after(build("chain"), "fission").graph
    statistics, normalise = Statistics.every(graph)[0], Normalise.every(graph)[0]
    new = graph.placeholder("new")
    assert provenance(new) == Provenance()
    take_halves(new, statistics.node, normalise.node)
    assert (provenance(new).statistics_of, provenance(new).normalises, provenance(new).module) == (("bn1",), ("bn1",), None)
    remember(statistics.node, shared_statistics=True)
    carry(new, statistics.node)
    assert provenance(new) == Provenance("bn1", statistics_of=("bn1", "bn1"), normalises=("bn1",), shared_statistics=True)
    assert new.meta["nn_module_stack"] == statistics.node.meta["nn_module_stack"]


def test_nobody_else_spells_what_nodes_remember() -> None:
    packages = (graph_package, passes, patterns, plan, report)
    sources = {path: path.read_text() for package in packages for path in Path(package.__path__[0]).glob("*.py")}
    assert not [path for path, source in sources.items() if 'meta["bnr_' in source or 'meta.get("bnr_' in source]
