"""Proofs that cannot fail prove nothing: each formula of the nodes, with an error in it, makes a proof fail.

The errors are put into the project's own functions. Others are put into what the proofs take for batch norm's definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import test_nodes as nodes
import torch
from algebra import NotProved
from prove import EPS, IMAGES, MOMENTUM, edited, planted, prove, symbolic
from torch import Tensor

Proof = Callable[[], None]

FISSION = partial(nodes.test_fission, (103, 107), True)
STATISTICS = partial(nodes.test_statistics, False)
THREADED_STATISTICS = partial(nodes.test_statistics, True)
NORMALISE = partial(nodes.test_normalise, "silu", False)
THREADED_NORMALISE = partial(nodes.test_normalise, "silu", True)
CONVOLUTION = partial(nodes.convolution, "relu")
THREADED_CONVOLUTION = partial(nodes.convolution, "relu", threaded=True)
NARROW_CONVOLUTION = partial(nodes.convolution, "relu", dtype=torch.bfloat16)
EXCITE = partial(nodes.test_squeeze_and_excite, "silu")
AVERAGE = partial(nodes.average_pool, "relu")
GLOBAL = partial(nodes.test_global_average, "relu")
MAXIMUM = partial(nodes.test_max_pool, "relu", ((3, 3), (2, 2), (1, 1)))
EXCITED_SWEEP = partial(nodes.test_excitation_in_a_sweep, "silu", "a pixel's")
GATED_SWEEP = partial(nodes.test_excitation_in_a_sweep, "silu", "a channel's")
ACTIVATED_BRANCH = partial(nodes.test_sum_of_an_activated_branch, "silu", False)
PLAIN_SUM = partial(nodes.test_sum_without_a_batch_norm, "relu")
JOIN = partial(nodes.join, "relu", "normalised", False, "sweep")
JOIN_OF_ANY_VECTORS = partial(nodes.test_residual_join_of_any_vectors, "relu")
SHARED_JOIN = partial(nodes.join, "relu", "normalised", True, "sweep")
JOIN_IN_CONVOLUTION = partial(nodes.join, "relu", "normalised", True, "convolution")
GATED_JOIN = partial(nodes.test_join_of_a_gated_branch, "relu", "tensor", "sweep")
GATED_JOIN_IN_CONVOLUTION = partial(nodes.test_join_of_a_gated_branch, "relu", "tensor", "convolution")

#: (the function, what stands in it, what is put in its place, a proof that must fail).
ERRORS: list[tuple[str, str, str, Proof]] = [
    ("divided", "count / 2.0", "count", STATISTICS),
    ("divided", "float(count)", "1.0", STATISTICS),
    ("divided", "(dvar, dmean), (", "(-dvar, dmean), (", CONVOLUTION),
    ("values_per_channel", "size.numel() // size[1]", "size.numel()", STATISTICS),
    ("statistics_forward", "correction=0", "correction=1", FISSION),
    ("statistics_forward", "if d != 1", "if d > 1", FISSION),
    ("reference:statistics_backward", "per_channel(b, x)", "0 * per_channel(b, x)", FISSION),
    ("reference:statistics_backward", "- per_channel(call.mean, x)", "+ per_channel(call.mean, x)", FISSION),
    ("reference:statistics_backward", "accumulate.to(d.dtype) + d", "d", THREADED_STATISTICS),
    ("finalize_forward", "var + call.eps", "var", FISSION),
    ("finalize_forward", "call.count / (call.count - 1)", "1.0", FISSION),
    ("finalize_forward", "call.weight.to(rstd.dtype) * rstd", "call.weight.to(rstd.dtype)", FISSION),
    ("_move", "(1 - momentum)", "momentum", FISSION),
    ("finalize_backward", "rstd.pow(2) * -0.5", "rstd.pow(2) * 0.5", FISSION),
    ("finalize_backward", "rstd.pow(2)", "rstd.pow(3)", FISSION),
    ("finalize_backward", "dscale * scale", "dscale", FISSION),
    ("finalize_backward", ", dscale * rstd", ", dscale", FISSION),
    ("finalize_backward", "-scale * call.dbeta", "-rstd * call.dbeta", FISSION),
    ("finalize_backward", "-scale * call.dbeta", "scale * call.dbeta", FISSION),
    ("affine", "(u - per_channel(t.mean, x))", "u", NORMALISE),
    ("affine", "+ per_channel(t.beta, x)", "- per_channel(t.beta, x)", NORMALISE),
    ("_times_gate", "z * t.gate", "z + t.gate", EXCITE),
    ("output_gradient", "d = d * per_channel(edge.s, p)", "pass", SHARED_JOIN),
    ("output_gradient", "+ per_channel(b, p)", "", CONVOLUTION),
    ("output_gradient", "edge.y.to(d.dtype) - per_channel(edge.mean, p)", "edge.y.to(d.dtype)", CONVOLUTION),
    ("input_gradient", "p * per_channel(t.scale, x), ", "p, ", NORMALISE),
    ("input_gradient", "channel_sum(p * centred)", "channel_sum(p * x)", NORMALISE),
    ("input_gradient", "activation_gradient(g.to(accumulation_dtype(x.dtype)), affine(x, t), t.act)", "g", NORMALISE),
    ("input_gradient", "affine(x, t), t.act)", "x, t.act)", NORMALISE),
    ("sweeps:_gradients", "-scale * sum_p", "scale * sum_p", NORMALISE),
    ("sweeps:_gradients", "sum_px, sum_p", "sum_p, sum_px", NORMALISE),
    ("write", "accumulate.add_", "accumulate.copy_", THREADED_NORMALISE),
    ("write", "accumulate.add_", "accumulate.copy_", THREADED_CONVOLUTION),
    ("gated", "* gate, (g", ", (g", EXCITE),
    ("gated", "* ungated)", ")", EXCITE),
    ("reference:conv_backward", "channel_sum(exact)", "channel_sum(call.dy)", CONVOLUTION),
    ("reference:conv_backward", "z = apply_transform(x, transform, dtype) if need_weight or need_x else x", "z = x", CONVOLUTION),
    ("reference:conv_backward", "g = restored(g, factor, exact.dtype)", "pass", NARROW_CONVOLUTION),
    ("reference:conv_backward", "restored(dw, factor, weight.dtype)", "dw", NARROW_CONVOLUTION),
    ("restored", "/ factor", "* factor", NARROW_CONVOLUTION),
    ("PlainConv.backward", "-scale * dbeta", "dbeta", CONVOLUTION),
    ("PlainConv.backward", "backward_edge(dgain,", "backward_edge(None,", SHARED_JOIN),
    ("backward_edge", "(dgain, dvar, dmean,", "(dgain, dmean, dvar,", CONVOLUTION),
    ("joined", "+ affine(join.r, join.tr)", "+ join.r", JOIN),
    ("joined", "_times_gate(affine(join.y, join.ty), join.ty)", "affine(join.y, join.ty)", GATED_JOIN),
    ("gated_operand", "_replace(act=transform.act)", "_replace()", GATED_JOIN_IN_CONVOLUTION),
    ("operand_gradients", "None, gated.gate", "None, None", GATED_JOIN),
    ("_Residual.backward", "NormaliseBackward(found.g, x, transform)", "NormaliseBackward(dout, x, transform)", GATED_JOIN),
    ("JoinConv.backward", "NormaliseBackward(gradients.g, x, transform)", "NormaliseBackward(z, x, transform)", GATED_JOIN_IN_CONVOLUTION),
    ("is_told_by_sum", "and join.tr.mean is None", "", partial(nodes.test_join_of_a_gated_branch, "relu", "normalised", "sweep")),
    ("reference:join_backward", "per_channel(a, z) * (z.to(acc) - per_channel(mean, z))", "per_channel(a, z) * z.to(acc)", JOIN),
    ("reference:join_backward", "+ per_channel(b, z)", "", JOIN),
    ("reference:join_backward", "joined(join), join.act)", "affine(y, ty), join.act)", JOIN),
    ("reference:join_backward", "(r.to(acc) - per_channel(tr.mean, r))", "(r.to(acc) - per_channel(ty.mean, r))", JOIN),
    ("operand_gradients", "-scale * sum_g", "scale * sum_g", JOIN_OF_ANY_VECTORS),
    ("operand_gradients", "-r_scale * sum_g", "-scale * sum_g", JOIN_OF_ANY_VECTORS),
    ("operand_gradients", "sum_gr, sum_g)", "sum_gy, sum_g)", JOIN),
    ("operand_gradients", "(_scaled(g, scale), None)", "(g, None)", JOIN),
    ("operand_gradients", "dgain = (g, scale)", "dgain = (_scaled(g, scale), scale)", SHARED_JOIN),
    ("operand_gradients", "dr_gain = (g, r_scale)", "dr_gain = (g, scale)", SHARED_JOIN),
    ("_behind_join", "call.join, call.x", "replace(call.join, act='identity'), call.x", JOIN_IN_CONVOLUTION),
    ("JoinConv.backward", "wanted, dz, join", "wanted, None, join", JOIN_IN_CONVOLUTION),
    ("with_gate", ") * gate", ") + gate", EXCITED_SWEEP),
    ("_StandsForZ.forward", "beta, act)", "beta)", EXCITED_SWEEP),
    ("_StandsForZ.backward", "return dz", "return 2 * dz", EXCITED_SWEEP),
    ("_Normalise.backward", "found), found.gate", "found), None", GATED_SWEEP),
    ("_Normalise.backward", "dr = dz if", "dr = 2 * dz if", ACTIVATED_BRANCH),
    ("_Normalise.backward", "dpassed, factors=factors", "dpassed", nodes.test_stochastic_depth),
    ("reference:normalise_backward", "* call.factors.reshape", "+ call.factors.reshape", nodes.test_stochastic_depth),
    ("_Normalise.backward", "transform, dpassed,", "transform, None,", partial(nodes.test_sum_of_an_activated_branch, "silu", True)),
    ("normalise_forward", "+ call.r.to(exact)", "- call.r.to(exact)", ACTIVATED_BRANCH),
    ("operand_gradients", "return *of_y, in_format_of(r, g),", "return *of_y, None,", PLAIN_SUM),
    ("_Residual.backward", "if out is None else out", "if out is None else -out", PLAIN_SUM),
    ("is_told_by_sum", '("identity", "relu")', '("identity", "relu", "silu")', partial(nodes.test_sum_without_a_batch_norm, "silu")),
    ("squeeze_forward", ".mean(2)", ".sum(2)", GLOBAL),
    ("squeeze_backward", "/ positions", "", GLOBAL),
    ("squeeze_backward", "g = g + dz.to(acc)", "pass", EXCITE),
    ("avg_pool", "beta / positions", "beta", AVERAGE),
    ("avg_pool", "scale / positions", "scale", AVERAGE),
    ("max_pool_forward", "flat // width - rows", "flat // width", MAXIMUM),
    ("max_pool_backward", "position % kw", "position // kw", MAXIMUM),
    ("max_pool_backward", "* sh - ph", "* sh", MAXIMUM),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "proof"), ERRORS, ids=[f"{name}: {new or 'nothing'} for {old}" for name, old, new, _ in ERRORS]
)
def test_an_error_in_the_code_has_no_proof(name: str, old: str, new: str, proof: Proof) -> None:
    with planted(name, edited(old, new)), pytest.raises(NotProved):
        proof()


def _norm(x: Tensor, gamma: Tensor, beta: Tensor, *, correction: int = 0, eps: float = EPS, mean_of: int = 1) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=correction)
    root = torch.rsqrt(var + eps)
    return (x - mean_of * mean.view(1, -1, 1, 1)) * (root * gamma).view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "the unbiased variance": partial(_norm, correction=1),
    "another eps": partial(_norm, eps=2 * EPS),
    "twice the mean": partial(_norm, mean_of=2),
    "no gamma": lambda x, gamma, beta: _norm(x, gamma / gamma.numel() * 0 + 1, beta),
    "momentum for eps": partial(_norm, eps=MOMENTUM),
    "a second activation": lambda x, gamma, beta: torch.relu(_norm(x, gamma, beta)),
}


@pytest.mark.parametrize("definition", ["batch norm", *DEFINITIONS])
def test_nothing_but_batch_norm_is_proved_of_fission(definition: str) -> None:
    s = symbolic()
    with s.running():
        inputs = [s.tensor("x", IMAGES, 17, 103, 107), s.tensor("gamma", 17), s.tensor("beta", 17)]
        if definition == "batch norm":
            prove(s, _norm, nodes.split_batch_norm, inputs)
        else:
            with pytest.raises(NotProved):
                prove(s, DEFINITIONS[definition], nodes.split_batch_norm, inputs)
