"""Each fused node, for all N, C and sizes: forward and every gradient, with means and variances spelt out as sums."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from algebra import NotProved
from prove import EPS, IMAGES, MOMENTUM, planted, prove, symbolic
from torch import Tensor
from torch.nn import functional as F

from bnrestructure import ops
from bnrestructure.core.activation import PLAIN_ACTIVATIONS, activate
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform

ACTIVATIONS = (*PLAIN_ACTIVATIONS, "leaky_relu(0.2)")
#: Sizes of an image, from none (BatchNorm1d behind a linear layer) to a volume's.
SPATIAL = ((), (100003,), (103, 107), (101, 103, 107))
SAME = ConvGeometry((1, 1), (1, 1), (1, 1), 1)

each_act = pytest.mark.parametrize("act", ACTIVATIONS)


def applied(x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, act: str = "identity") -> Tensor:
    """The forward edge's definition."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    return activate((x - mean.view(shape)) * scale.view(shape) + beta.view(shape), act)


@pytest.mark.parametrize("spatial", SPATIAL, ids=len)
@pytest.mark.parametrize("affine", [True, False])
def test_fission(spatial: tuple[int, ...], affine: bool) -> None:
    """statistics, finalize and normalise are batch norm, with the running statistics it leaves, any momentum and any eps."""
    s = symbolic()
    with s.running():
        x = s.tensor("x", IMAGES, 17, *spatial)
        parameters = [s.tensor("gamma", 17), s.tensor("beta", 17)] if affine else []
        state: list[Tensor] = []

        def renewed() -> list[Tensor]:
            state[:] = [s.tensor(s.algebra.leaf(name, 1), 17, grad=False) for name in ("running_mean", "running_var")]
            return state

        def original(x: Tensor, *parameters: Tensor) -> Tensor:
            return F.batch_norm(x, *state, *(parameters or (None, None)), True, MOMENTUM, EPS)

        prove(s, original, lambda x, *parameters: split_batch_norm(x, *(parameters or (None, None)), *state), [x, *parameters], renewed)


def split_batch_norm(x: Tensor, gamma: Any, beta: Any, running_mean: Any = None, running_var: Any = None, act: str = "identity") -> Tensor:
    """What fission makes of a batch norm."""
    found = ops.statistics(x, backend="reference")
    running = ops.Running(running_mean, running_var)
    vectors = ops.finalize(found.mean, found.var, found.size, gamma, beta, running, MOMENTUM, EPS, backend="reference")
    return ops.normalise(x, Transform(*vectors[:3], act), backend="reference")[0]


def test_pytorch_differentiates_the_same_definition() -> None:
    """PyTorch's own backward, in the words of the algebra, is the derivative of batch norm's definition."""
    s = symbolic()
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), s.tensor("gamma", 17), s.tensor("beta", 17)]

        def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.0, EPS))

        prove(s, norm, norm, inputs)


@pytest.mark.parametrize("threaded", [False, True])
def test_statistics(threaded: bool) -> None:
    """The derivatives of mean and variance are 1 / M and 2 (x - mean) / M; a threaded tensor's other gradient is added."""
    s = symbolic()
    with s.running():
        x = s.tensor("x", IMAGES, 17, 103, 107)

        def rewritten(x: Tensor) -> list[Tensor | None]:
            mean, var, _, passed, _ = ops.statistics(x, chain=threaded, backend="reference")
            return [mean, var, passed]

        def original(x: Tensor) -> list[Tensor]:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            return [mean, var, *([x] if threaded else [])]

        prove(s, original, rewritten, [x])


@pytest.mark.parametrize("behind", [False, True])
def test_statistics_that_are_handed_on(behind: bool) -> None:
    """Two batch norms read the same statistics, the second those of a concat: their gradients add up in the first's backward."""
    s = symbolic()
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), *(s.tensor(name, 17) for name in ("gamma", "beta", "gamma_2", "beta_2"))]
        inputs += [s.tensor("w", IMAGES, 19, 103, 107), s.tensor("gamma_w", 19), s.tensor("beta_w", 19)] if behind else []

        def second_norm(x: Tensor, gamma: Tensor, beta: Tensor, w: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
            return (torch.cat([x, w[0]], 1), torch.cat([gamma, w[1]]), torch.cat([beta, w[2]])) if w else (x, gamma, beta)

        def original(x: Tensor, gamma: Tensor, beta: Tensor, gamma_2: Tensor, beta_2: Tensor, *w: Tensor) -> list[Tensor]:
            return [F.relu(_normed(x, gamma, beta)), F.relu(_normed(*second_norm(x, gamma_2, beta_2, w)))]

        def rewritten(x: Tensor, gamma: Tensor, beta: Tensor, gamma_2: Tensor, beta_2: Tensor, *w: Tensor) -> list[Tensor]:
            mean, var, size, *_ = ops.statistics(x, backend="reference")
            layer = ops.Running(), 0.0, EPS
            *first, mean, var = ops.finalize(mean, var, size, gamma, beta, *layer, chain=True, backend="reference")
            more = ops.More(*ops.statistics(w[0], backend="reference")[:2]) if w else ops.More()
            whole, gamma_2, beta_2 = second_norm(x, gamma_2, beta_2, w)
            *second, _, _ = ops.finalize(mean, var, size, gamma_2, beta_2, *layer, more=more, backend="reference")
            return [ops.normalise(z, Transform(*v, "relu"), backend="reference")[0] for z, v in ((x, first), (whole, second))]

        prove(s, original, rewritten, inputs)


@each_act
@pytest.mark.parametrize("threaded", [False, True])
def test_normalise(act: str, threaded: bool) -> None:
    s = symbolic()
    with s.running():
        x = s.tensor("x", IMAGES, 17, 103, 107)
        vectors = [s.tensor(name, 17) for name in ("mean", "scale", "beta")]

        def original(x: Tensor, *vectors: Tensor) -> list[Tensor]:
            return [applied(x, *vectors, act), *([x] if threaded else [])]

        def rewritten(x: Tensor, *vectors: Tensor) -> list[Tensor | None]:
            return list(ops.normalise(x, Transform(*vectors, act), chain=threaded, backend="reference"))

        prove(s, original, rewritten, [x, *vectors])


def convolution(act: str, *, threaded: bool = False, dtype: torch.dtype = torch.float32, **geometry: Any) -> None:
    """Prove the convolution node with everything on it: prologue, bias, statistics and thread."""
    s = symbolic()
    same = SAME._replace(**geometry)
    vector = torch.float64 if dtype is torch.float64 else torch.float32
    with s.running():
        x = s.tensor("x", IMAGES, 18, 103, 107, dtype=dtype)
        vectors = [s.tensor(name, 18, dtype=vector) for name in ("mean", "scale", "beta")]
        weight = s.tensor("w", 22, 18 // same.groups, 3, 3, dtype=dtype)
        bias = s.tensor("bias", 22, dtype=dtype)

        def original(x: Tensor, *rest: Tensor) -> list[Tensor]:
            *vectors, weight, bias = rest
            z = applied(x, *vectors, act)
            y = F.conv2d(z, weight.to(z.dtype), bias.to(z.dtype), *same)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            return [y, mean, var, *([x] if threaded else [])]

        def rewritten(x: Tensor, *rest: Tensor) -> list[Tensor | None]:
            *vectors, weight, bias = rest
            y, mean, var, _, passed, *_ = ops.conv(
                x, Transform(*vectors, act), weight, bias, same, statistics=True, chain=threaded, backend="reference"
            )  # fmt: skip
            return [y, mean, var, passed]

        prove(s, original, rewritten, [x, *vectors, weight, bias])


@each_act
def test_convolution(act: str) -> None:
    convolution(act)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_convolution_in_other_dtypes(dtype: torch.dtype, threaded: bool) -> None:
    """In bfloat16 the output gradient is multiplied by a factor before it is rounded: the factor leaves no trace."""
    convolution("relu", dtype=dtype, threaded=threaded)


@pytest.mark.parametrize("geometry", [{"stride": (2, 1)}, {"groups": 2}, {"dilation": (2, 3)}, {"padding": (0, 2)}], ids=str)
def test_convolution_of_another_geometry(geometry: dict[str, Any]) -> None:
    convolution("silu", **geometry)


@pytest.mark.parametrize("act", ["silu", "relu", "hardswish"])
def test_squeeze_and_excite(act: str) -> None:
    """The average, the gate made of it, and the convolution of the gated tensor with its statistics; another reader of the average."""
    s = symbolic()
    with s.running():
        x = s.tensor("x", IMAGES, 17, 103, 107)
        vectors = [s.tensor(name, 17) for name in ("mean", "scale", "beta")]
        weight = s.tensor("w", 19, 17, 3, 3)

        def original(x: Tensor, *rest: Tensor) -> list[Tensor]:
            z = applied(x, *rest[:3], act)
            pooled = z.mean((2, 3))
            y = F.conv2d(z * torch.sigmoid(pooled).view(*pooled.shape, 1, 1), rest[3], padding=1)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            return [y, mean, var, pooled]

        def rewritten(x: Tensor, *rest: Tensor) -> list[Tensor | None]:
            transform = Transform(*rest[:3], act)
            pooled, z = ops.squeeze(x, transform, excite=True, backend="reference")
            gated = transform._replace(gate=torch.sigmoid(pooled).view(*pooled.shape, 1, 1))
            found = ops.conv(z, gated, rest[3], None, SAME, statistics=True, backend="reference")
            return [found.y, found.mean, found.var, pooled]

        prove(s, original, rewritten, [x, *vectors, weight])


@pytest.mark.parametrize("gate", ["a channel's", "a pixel's"])
@pytest.mark.parametrize("act", ["silu", "identity"])
def test_excitation_in_a_sweep(act: str, gate: str) -> None:
    """The gated tensor in memory: where no convolution reads it alone, and where the gate is of a shape that no kernel knows."""
    s = symbolic()
    with s.running():
        inputs = [s.tensor(name, IMAGES, 17, 103, 107) for name in ("x", "factor")]
        inputs += [s.tensor(name, 17) for name in ("mean", "scale", "beta")]

        def spread(pooled: Tensor, factor: Tensor) -> Tensor:
            by_channel = torch.sigmoid(pooled).view(*pooled.shape, 1, 1)
            return by_channel if gate == "a channel's" else by_channel * factor

        def original(x: Tensor, factor: Tensor, *vectors: Tensor) -> list[Tensor]:
            z = applied(x, *vectors, act)
            pooled = z.mean((2, 3))
            return [z * spread(pooled, factor), pooled, factor + 0 * z]

        def rewritten(x: Tensor, factor: Tensor, *vectors: Tensor) -> list[Tensor | None]:
            transform = Transform(*vectors, act)
            pooled, z = ops.squeeze(x, transform, excite=True, backend="reference")
            gated = transform._replace(gate=spread(pooled, factor))
            return [ops.normalise(z, gated, backend="reference").z, pooled, factor + 0 * x]

        prove(s, original, rewritten, inputs)


@each_act
def test_global_average(act: str) -> None:
    s = symbolic()
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), *(s.tensor(name, 17) for name in ("mean", "scale", "beta"))]
        prove(
            s,
            lambda x, *vectors: applied(x, *vectors, act).mean((2, 3)),
            lambda x, *vectors: ops.squeeze(x, Transform(*vectors, act), backend="reference")[0],
            inputs,
        )


def average_pool(act: str) -> None:
    s = symbolic()
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), *(s.tensor(name, 17) for name in ("mean", "scale", "beta"))]
        window = PoolGeometry((3, 2), (2, 2), (1, 0))
        prove(
            s,
            lambda x, *vectors: [F.avg_pool2d(applied(x, *vectors, act), *window[:3]), x],
            lambda x, *vectors: list(ops.avg_pool(x, Transform(*vectors, act), window, chain=True, backend="reference")),
            inputs,
        )


@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu(0.2)"])
def test_average_pool(act: str) -> None:
    """The window's size goes into scale and beta: the same for an activation that a positive factor goes through."""
    average_pool(act)


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a not in ("identity", "relu", "leaky_relu(0.2)")])
def test_no_other_activation_lets_the_window_out(act: str) -> None:
    """Why the node refuses them: with the refusal out of the way there is no proof."""
    with planted("is_homogeneous", lambda _: lambda act: True), pytest.raises(NotProved):
        average_pool(act)


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("window", [((3, 3), (2, 2), (1, 1)), ((2, 4), (3, 1), (1, 2))], ids=str)
def test_max_pool(act: str, window: tuple[tuple[int, int], ...]) -> None:
    """The position inside the window that forward stores finds the maximum again in backward."""
    s = symbolic()
    kernel, stride, padding = window
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), *(s.tensor(name, 17) for name in ("mean", "scale", "beta"))]
        prove(
            s,
            lambda x, *vectors: [F.max_pool2d(applied(x, *vectors, act), kernel, stride, padding), x],
            lambda x, *vectors: list(ops.max_pool(x, Transform(*vectors, act), PoolGeometry(*window), chain=True, backend="reference")),
            inputs,
        )


def _normed(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(y, None, None, gamma, beta, True, 0.0, EPS)


def _vectors(found: Any, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, scale and beta of a node's output."""
    return ops.finalize(found.mean, found.var, found.size, gamma, beta, ops.Running(), 0.0, EPS, backend="reference")[:3]


@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
@pytest.mark.parametrize("shortcut", ["tensor", "normalised"])
@pytest.mark.parametrize("gained", [False, True])
def test_residual_join(act: str, shortcut: str, gained: bool) -> None:
    """conv, batch norm, add, activation, and the statistics of the sum; with ``gain`` its producers apply their scales."""
    join(act, shortcut, gained, "sweep")


@pytest.mark.parametrize("shortcut", ["tensor", "normalised"])
@pytest.mark.parametrize("gained", [False, True])
def test_residual_join_in_a_convolution(shortcut: str, gained: bool) -> None:
    """The same where the convolution that reads the sum forms it, and another reader has the sum from there."""
    join("relu", shortcut, gained, "convolution")


def join(act: str, shortcut: str, gained: bool, where: str) -> None:
    s = symbolic(defined=False)
    both = shortcut == "normalised"
    with s.running():
        x, r = s.tensor("x", IMAGES, 17, 103, 107), s.tensor("r", IMAGES, 17, 103, 107)
        rest = [s.tensor("w", 17, 17, 3, 3), s.tensor("gamma", 17), s.tensor("beta", 17)]
        rest += [s.tensor("w_r", 17, 17, 3, 3), s.tensor("gamma_r", 17), s.tensor("beta_r", 17)] if both else []
        reader = s.tensor("w_next", 19, 17, 3, 3)

        def original(x: Tensor, r: Tensor, reader: Tensor, *rest: Tensor) -> list[Tensor]:
            u = _normed(F.conv2d(x, rest[0], padding=1), *rest[1:3])
            z = activate(u + (_normed(F.conv2d(r, rest[3], padding=1), *rest[4:]) if both else r), act)
            if where == "sweep":
                var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
                return [z, mean, var]
            y = F.conv2d(z, reader, padding=1)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            return [z, y, mean, var]

        def rewritten(x: Tensor, r: Tensor, reader: Tensor, *rest: Tensor) -> list[Tensor | None]:
            plain = functools.partial(ops.conv, bias=None, geometry=SAME, statistics=True, gain=gained, backend="reference")
            one = plain(x, Transform(), rest[0])
            vectors = _vectors(one, *rest[1:3])
            other = plain(r, Transform(), rest[3]) if both else None
            of_r = _vectors(other, *rest[4:]) if both else (None, None, None)
            r = other.y if other is not None else r
            gains = one.gain if gained else None, other.gain if gained and other is not None else None
            if where == "sweep":
                joined = ops.residual(
                    one.y, Transform(*vectors), r, Transform(*of_r), act=act, gain=gains[0], r_gain=gains[1],
                    statistics=True, backend="reference",
                )  # fmt: skip
                return [joined.out, joined.mean, joined.var]
            shortcut = ops.Shortcut(r, *of_r, *gains)
            y, mean, var, _, passed, *_ = ops.conv(
                one.y, Transform(*vectors, act), reader, None, SAME, shortcut=shortcut, statistics=True, chain=True, backend="reference"
            )  # fmt: skip
            return [passed, y, mean, var]

        prove(s, original, rewritten, [x, r, reader, *rest])


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("shortcut", ["tensor", "normalised"])
@pytest.mark.parametrize("where", ["sweep", "convolution"])
def test_join_of_a_gated_branch(act: str, shortcut: str, where: str) -> None:
    """A squeeze-excite's product, add, activation, and the statistics of the sum, or the convolution that forms the sum."""
    s = symbolic(defined=False)
    both = shortcut == "normalised"
    with s.running():
        inputs = [s.tensor(name, IMAGES, 17, 103, 107) for name in ("x", "r")]
        inputs += [s.tensor(name, 17) for name in ("mean", "scale", "beta", *(("r_mean", "r_scale", "r_beta") if both else ()))]
        weight = s.tensor("w_next", 19, 17, 3, 3)

        def original(weight: Tensor, x: Tensor, r: Tensor, *vectors: Tensor) -> list[Tensor]:
            u = applied(x, *vectors[:3])
            pooled = u.mean((2, 3))
            gated = u * torch.sigmoid(pooled).view(*pooled.shape, 1, 1)
            z = activate(gated + (applied(r, *vectors[3:]) if both else r), act)
            y = z if where == "sweep" else F.conv2d(z, weight, padding=1)
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
            return [y, mean, var, pooled, z]

        def rewritten(weight: Tensor, x: Tensor, r: Tensor, *vectors: Tensor) -> list[Tensor | None]:
            transform = Transform(*vectors[:3])
            pooled, deferred = ops.squeeze(x, transform, excite=True, backend="reference")
            transform = transform._replace(act=act, gate=torch.sigmoid(pooled).view(*pooled.shape, 1, 1))
            if where == "sweep":
                found = ops.residual(
                    deferred, transform, r, Transform(*vectors[3:]), act=act, statistics=True, backend="reference"
                )  # fmt: skip
                return [found.out, found.mean, found.var, pooled, found.out]
            shortcut = ops.Shortcut(r, *vectors[3:])
            y, mean, var, _, z, *_ = ops.conv(
                deferred, transform, weight, None, SAME, shortcut=shortcut, statistics=True, chain=True, backend="reference"
            )  # fmt: skip
            return [y, mean, var, pooled, z]

        prove(s, original, rewritten, [weight, *inputs])


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_sum_of_an_activated_branch(act: str, threaded: bool) -> None:
    """``act((x - mean) * scale + beta) + r`` in one sweep; ``threaded``: x has another reader, whose gradient is added to."""
    s = symbolic()
    with s.running():
        inputs = [s.tensor(name, IMAGES, 17, 103, 107) for name in ("x", "r")]
        inputs += [s.tensor(name, 17) for name in ("mean", "scale", "beta")]

        def original(x: Tensor, r: Tensor, *vectors: Tensor) -> list[Tensor]:
            return [applied(x, *vectors, act) + r, *([x] if threaded else [])]

        def rewritten(x: Tensor, r: Tensor, *vectors: Tensor) -> list[Tensor | None]:
            z, passed, _ = ops.normalise(x, Transform(*vectors, act), r, chain=threaded, backend="reference")
            return [z, *([passed] if threaded else [])]

        prove(s, original, rewritten, inputs)


def test_stochastic_depth() -> None:
    """``act((x - mean) * scale + beta) * factor + r``, the factor one constant for each image."""
    s = symbolic()
    with s.running():
        inputs = [s.tensor(name, IMAGES, 17, 103, 107) for name in ("x", "r")]
        inputs += [s.tensor(name, 17) for name in ("mean", "scale", "beta")]
        factor = s.tensor("factor", IMAGES, 1, 1, 1).detach()

        def original(x: Tensor, r: Tensor, *vectors: Tensor) -> Tensor:
            return applied(x, *vectors, "silu") * factor + r

        def rewritten(x: Tensor, r: Tensor, *vectors: Tensor) -> Tensor:
            return ops.normalise(x, Transform(*vectors, "silu"), r, factor=factor, backend="reference").z

        prove(s, original, rewritten, inputs)


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_sum_without_a_batch_norm(act: str) -> None:
    """Both operands as they are, and the statistics of the sum; of the identity and of relu backward keeps the sum alone."""
    s = symbolic(defined=False)
    with s.running():

        def original(y: Tensor, r: Tensor) -> list[Tensor]:
            z = activate(y + r, act)
            var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
            return [z, mean, var]

        def rewritten(y: Tensor, r: Tensor) -> list[Tensor | None]:
            return list(ops.residual(y, Transform(), r, act=act, statistics=True, backend="reference")[:3])

        prove(s, original, rewritten, [s.tensor(name, IMAGES, 17, 103, 107) for name in ("y", "r")])


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_residual_join_of_any_vectors(act: str) -> None:
    """With vectors that are no batch norm's: the means have gradients of their own."""
    s = symbolic(defined=False)
    with s.running():
        images = [s.tensor(name, IMAGES, 17, 103, 107) for name in ("y", "r")]
        vectors = [s.tensor(name, 17) for name in ("mean", "scale", "beta", "r_mean", "r_scale", "r_beta")]
        prove(
            s,
            lambda y, r, *v: activate(applied(y, *v[:3], "identity") + applied(r, *v[3:], "identity"), act),
            lambda y, r, *v: ops.residual(y, Transform(*v[:3]), r, Transform(*v[3:]), act=act, backend="reference").out,
            [*images, *vectors],
        )


def test_the_number_of_images_is_of_no_account() -> None:
    """The same program at other sizes is the same algebra: no size was burnt in."""
    found = []
    for images, size in ((1009, (103, 107)), (2003, (59, 83))):
        s = symbolic(images)
        with s.running(), torch.no_grad():
            x, gamma, beta = s.tensor("x", images, 17, *size), s.tensor("gamma", 17), s.tensor("beta", 17)
            found.append(str(s.expression(split_batch_norm(x, gamma, beta, act="silu"))))
    assert found[0] == found[1]
