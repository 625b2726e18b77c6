"""Concats whose segments are normalised: the normalise writes its slice of the concat, and its other readers read that slice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure import ops
from bnrestructure.core.edges import Transform
from bnrestructure.graph.chains import passed_tensor
from bnrestructure.graph.ir import ConcatBuffer, Conv, Normalise, OwnGradient
from bnrestructure.passes.pipeline import PASSES


class _Net(nn.Module):
    """Three convolutions with batch norms behind a stem; ``body`` is given the stem's result and the first of them, normalised."""

    def __init__(self, body: Callable[[_Net, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(4))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.wide = nn.Conv2d(16, 8, 1)
        self.body = body

    def forward(self, x: Tensor) -> object:
        x = F.relu(self.bn0(self.stem(x)))
        return self.body(self, x, self.bn1(self.conv1(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(x))


def _cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def _ghost(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    """GhostNet's: cheap features of features, and both concatenated; the second half is linear."""
    z = F.relu(y)
    return m.wide(_cat(z, m.second(z)))


def _res2(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    """Res2Net's: each branch is read by the next one's sum, and by the concat."""
    z = F.relu(y)
    return m.wide(_cat(z, F.relu(m.second(z + x.tanh()))))


def _aggregated(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    z = F.silu(y)
    w = F.silu(m.second(z))
    return m.wide(_cat(F.gelu(m.bn3(m.wide(_cat(z, w)))), w))


def _gated(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    z = F.relu(y)
    return m.wide(_cat(x.tanh(), z * m.conv3(z.mean((2, 3), keepdim=True)).sigmoid()))


def _twice(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    """Two concats of one segment: a slice of the first is copied into the second."""
    z = F.silu(y)
    return m.wide(_cat(z, m.second(x))) + m.wide(_cat(F.gelu(m.bn3(m.conv3(x))), z))


def _dense_sum(m: _Net, x: Tensor, y: Tensor) -> Tensor:
    """Two convolutions and a concat read what a branch and its shortcut add up to."""
    s = x + F.silu(y)
    return m.wide(_cat(s, F.silu(m.second(s)))) + F.gelu(m.bn3(m.conv3(s)))


def _read_on(m: _Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.silu(y)
    return _cat(x.tanh(), z), m.second(z + x.sigmoid())


#: (the body, the segments that are normalised in place, those that are copied).
BODIES: dict[str, tuple[Callable[[_Net, Tensor, Tensor], object], int, int]] = {
    "two branches": (lambda m, x, y: m.wide(_cat(F.silu(y), F.gelu(m.second(x)))), 2, 0),
    "a branch and what is no convolution's": (lambda m, x, y: m.wide(_cat(x.tanh(), F.silu(y))), 1, 1),
    "a branch and a convolution": (lambda m, x, y: m.wide(_cat(m.conv2(x), F.silu(y))), 1, 0),
    "an upsampled tensor": (lambda m, x, y: m.wide(_cat(F.interpolate(F.avg_pool2d(x.tanh(), 1), scale_factor=1), F.silu(y))), 1, 1),
    "a half": (lambda m, x, y: m.wide(_cat(*x.tanh().chunk(2, 1), F.silu(y))), 1, 2),
    "a sum of others": (lambda m, x, y: m.wide(_cat(x.tanh() + x.sigmoid(), F.silu(y))), 1, 1),
    "a product that broadcasts": (lambda m, x, y: m.wide(_cat(x.tanh() * x.chunk(8, 1)[0], F.silu(y))), 0, 0),
    "ghosts": (_ghost, 2, 0),
    "branches that read each other": (_res2, 2, 0),
    "an aggregation": (_aggregated, 2, 0),
    "a gate": (_gated, 1, 1),
    "two concats": (_twice, 3, 1),
    "an activated branch with its shortcut": (lambda m, x, y: m.wide(_cat(x.tanh(), x + F.silu(y))), 1, 1),
    "a sum that convolutions read": (_dense_sum, 2, 0),
    "the concat returned": (lambda m, x, y: _cat(x.tanh(), F.silu(y)), 1, 1),
    "a linear layer behind": (lambda m, x, y: _cat(x.tanh(), F.silu(y)).flatten(1).sum(1), 1, 1),
    "nobody reads the concat but its sizes": (lambda m, x, y: (lambda c: m.conv2(F.relu(y)) * c.shape[1])(_cat(x.tanh(), y)), 1, 1),
    "the concat returned, and a branch read on": (_read_on, 0, 0),
    "a branch returned": (lambda m, x, y: (lambda z: (m.wide(_cat(x.tanh(), z)), z))(F.silu(y)), 0, 0),
    "a branch in halves": (lambda m, x, y: (lambda z: m.wide(_cat(x.tanh(), z)) + z.chunk(2, 1)[0].sum())(F.silu(y)), 0, 0),
    "a branch changed in place": (lambda m, x, y: (lambda z: m.wide(_cat(x.tanh(), z)) + z[:, :1].zero_())(F.silu(y)), 0, 0),
    "a concat of other dimensions": (lambda m, x, y: torch.cat([x.tanh(), F.silu(y)], 2), 0, 0),
    "several dtypes": (lambda m, x, y: _cat(x.tanh(), F.silu(y).float()).double(), 0, 0),
}


@pytest.mark.parametrize("body", BODIES)
def test_normalises_write_their_slices(body: str) -> None:
    made, written, copied = BODIES[body]
    model = _Net(made).double()
    x = torch.randn(4, 3, 8, 6, dtype=torch.float64)
    rewritten = assert_same_training(model, x)
    assert_same_training(model, x.to(memory_format=torch.channels_last), options={"backend": "auto"})
    assert all(site.ran for site in bnrestructure.explain(rewritten).sites if site.status != "kept")
    graph = after(model, *PASSES).graph
    assert sum(normalise.in_buffer for normalise in Normalise.every(graph)) == written
    assert len(ConcatBuffer.every(graph)) == copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", ["two branches", "ghosts", "branches that read each other", "a gate"])
def test_on_the_cpu_kernels(body: str, dtype: torch.dtype) -> None:
    report = bnrestructure.verify(_Net(BODIES[body][0]).train(), torch.randn(4, 3, 16, 12), dtype=dtype)
    assert report.ok, report


def test_under_autocast() -> None:
    model = _Net(BODIES["a branch and a convolution"][0]).train()
    x = torch.randn(4, 3, 16, 12)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        found = bnrestructure.restructure(model)(x)
    assert found.dtype is plain.dtype
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05)


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(_Net(BODIES["two branches"][0]).train(), torch.randn(2, 3, 8, 6))
    (site,) = [site for site in plan.sites if site.name == "bn1"]
    assert (site.pattern, site.status, site.reason) == ("conv-bn-silu-concat", "fused", None)


def test_a_copied_segment_is_kept_for_its_concat_in_the_users_words() -> None:
    def body(m: _Net, x: Tensor, y: Tensor) -> Tensor:
        z = F.silu(y)
        return m.wide(_cat(m.conv2(F.gelu(m.bn2(m.conv3(x)))), z)) + F.interpolate(z, scale_factor=1)

    plan = bnrestructure.explain(_Net(body).train(), torch.randn(2, 3, 8, 6))
    (site,) = [site for site in plan.sites if site.name == "bn1"]
    assert (site.status, site.reason) == ("partial", "its normalised tensor is kept in memory for cat, interpolate")


def test_what_is_frozen_needs_no_gradient() -> None:
    """A segment that takes no part in backward stays so, though others write to the same buffer."""
    buffer = torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    x, vectors = torch.randn(2, 2, 3, 3), torch.rand(3, 2)
    made = ops.normalise(x, Transform(*vectors, "relu"), slot=ops.Slot(buffer * 1, 2), chain=True, backend="reference")
    assert made.passed is not None
    assert made.buffer is not None
    assert (made.z.requires_grad, made.passed.requires_grad, made.buffer.requires_grad) == (False, False, True)
    assert torch.equal(made.buffer[:, 2:], made.z)
    made.buffer.sum().backward()
    assert torch.equal(buffer.grad, torch.ones_like(buffer))


def test_a_slice_in_backward_is_nobody_elses() -> None:
    """The shortcut of an activated branch gets a slice of the concat's gradient, and links behind the shortcut write to theirs."""

    def body(m: _Net, x: Tensor, y: Tensor) -> Tensor:
        t = m.conv3(x)
        return _cat(m.conv2(F.relu(m.bn2(t))) + m.conv3(F.relu(m.bn3(t))), t + F.silu(y))

    model = _Net(body).train()
    graph = after(model, *PASSES).graph
    (added,) = [normalise for normalise in Normalise.every(graph) if normalise.r is not None]
    assert OwnGradient.of(added.r) is not None
    rewritten = bnrestructure.restructure(model)
    gradient = torch.randn(4, 16, 8, 6).contiguous(memory_format=torch.channels_last)
    before = gradient.clone()
    rewritten(torch.randn(4, 3, 8, 6)).backward(gradient)
    assert torch.equal(gradient, before)


def test_a_concat_that_hung_on_a_chain_leaves_nothing_there() -> None:
    """Between the convolutions that read the sum stood a copy of its gradient, for the concat's sake."""
    model = _Net(_dense_sum)
    assert len(OwnGradient.every(after(model, *PASSES[: PASSES.index("eliminate-concat")]).graph)) == 1
    assert OwnGradient.every(after(model, *PASSES).graph) == []


def test_forward_keeps_no_segment_beside_the_concat() -> None:
    kept: dict[int, torch.Size] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.shape
        return t

    model = bnrestructure.restructure(_Net(BODIES["ghosts"][0]).train())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(torch.randn(4, 3, 16, 12))
    sizes = list(kept.values())
    assert sizes.count(torch.Size((4, 16, 16, 12))) == 1  # the concat, which the last convolution reads
    assert sizes.count(torch.Size((4, 8, 16, 12))) == 3  # what the three batch norms normalise


def _readers_of_the_first(body: Callable[[_Net, Tensor, Tensor], object]) -> tuple[Normalise, Conv]:
    """The normalise that writes a slice of the concat, and the convolution behind it that has a batch norm."""
    graph = after(_Net(body), *PASSES).graph
    (written,) = [normalise for normalise in Normalise.every(graph) if normalise.in_buffer][:1]
    (conv,) = [conv for conv in Conv.every(graph) if conv.statistics and "conv2" in str(conv.weight)]
    return written, conv


def test_a_convolution_reads_the_slice_that_the_concat_keeps() -> None:
    written, conv = _readers_of_the_first(_ghost)
    assert conv.mean is None
    assert passed_tensor(conv.x) is written.outs()["z"]


def test_it_normalises_itself_where_the_concat_gets_out() -> None:
    """As GhostNet spells it: a slice of the concat. The normalised tensor is a slice of it then for nobody else."""
    written, conv = _readers_of_the_first(lambda m, x, y: _ghost_in_part(m, F.relu(y)))
    assert conv.mean is not None
    assert "z" not in written.outs()


def _ghost_in_part(m: _Net, z: Tensor) -> Tensor:
    return _cat(z, m.second(z))[:, :16].tanh()
