"""The planted faults: one for each thing that a pass, a node or a kernel could get wrong."""

from __future__ import annotations

from tests.mutations.tree import Fault

__all__ = ["FAULTS"]

#: The formulas, in core, ops and the reference kernels.
FORMULAS = (
    Fault("divided", "count / 2.0", "(count - 1) / 2.0", "proofs:test_nodes.py"),
    Fault("divided", "float(count)", "-float(count)", "proofs:test_nodes.py"),
    Fault("reference:finalize_forward", "torch.rsqrt(var + call.eps)", "torch.rsqrt(var) + call.eps", "proofs:test_nodes.py"),
    Fault("reference:finalize_forward", "(call.count / (call.count - 1))", "((call.count - 1) / call.count)", "proofs:test_nodes.py"),
    Fault("reference:finalize_backward", "* -0.5", "* 0.5", "proofs:test_nodes.py"),
    Fault("reference:finalize_backward", "-scale * call.dbeta", "-rstd * call.dbeta", "proofs:test_nodes.py"),
    Fault("elementwise:input_gradient", "channel_sum(p * centred)", "channel_sum(g * centred)", "proofs:test_nodes.py"),
    Fault("elementwise:output_gradient", "per_channel(a, p) * centred", "per_channel(a, p) * edge.y", "proofs:test_nodes.py"),
    Fault("reference:conv_backward", "restored(dw, factor, weight.dtype)", "dw.to(weight.dtype)", "proofs:test_nodes.py"),
    Fault("operand_gradients", "-r_scale * sum_g", "-scale * sum_g", "proofs:test_nodes.py"),
    Fault("is_told_by_sum", "and join.tr.mean is None", "", "proofs:test_nodes.py"),
    Fault("reference:join_backward", "joined(join), join.act)", "z.to(acc), join.act)", "proofs:test_nodes.py"),
    Fault("reference:squeeze_backward", "dpooled.to(acc) / positions", "dpooled.to(acc)", "proofs:test_nodes.py"),
    Fault("reference:max_pool_backward", "+ position % kw", "+ position % kh", "proofs:test_nodes.py"),
    Fault("avg_pool", "beta / positions", "beta", "proofs:test_nodes.py"),
    Fault("_Synchronise.forward", "(means - merged_mean).square()", "(means - mean).square()", "proofs:test_merging.py"),
    Fault("_Synchronise.backward", "weight * dvar, None", "dvar, None", "proofs:test_merging.py"),
    Fault("dithered", "- 0.5\n", "\n", "proofs:test_rounding_expectations.py"),
    Fault(
        "activation_gradient", "hardtanh_backward(gradient, u, 0.0, 6.0)", "hardtanh_backward(gradient, u, -1.0, 6.0)",
        "proofs:test_meanings.py",
    ),
    Fault("ConvGeometry.output_size", "d * (k - 1) - 1", "d * k - 1", "proofs:test_index_arithmetic.py"),
    Fault("channel_slice", "x.storage_offset() + start", "start", "proofs:test_index_arithmetic.py"),
)  # fmt: skip

#: What nodes do with memory and with each other's gradients.
NODES = (
    Fault("PlainConv.backward", "wanted, dpassed,", "wanted, None,", "proofs:test_nodes.py"),
    Fault("JoinConv.backward", "wanted, dz, join", "wanted, None, join", "proofs:test_nodes.py"),
    Fault("incoming_gradient", "narrow(1, written.offset, written.channels)", "narrow(1, 0, written.channels)", "proofs:test_passes.py"),
    Fault("_ConcatBuffer.backward", "copy=ctx.own", "copy=False", "proofs:test_passes.py"),
    Fault("_Finalize.backward", "rstd, scale, of_mean, of_var)", "rstd, scale)", "proofs:test_nodes.py"),
    Fault("_halves", "return mean, var, behind_mean, behind_var", "return mean, var, behind_mean, None", "proofs:test_nodes.py"),
    Fault("_Normalise.backward", "dz + dslice", "dslice", "proofs:test_passes.py"),
    Fault("_Residual.backward", "g=found.g.clone()", "g=found.g", "proofs:test_passes.py"),
    Fault("guard_second_derivative", "if not torch.is_grad_enabled():", "if True:", "tests/test_semantics_autograd.py"),
    Fault("compute_dtype", " and x.dtype != torch.float64", "", "tests/test_autocast_of_float64.py"),
)  # fmt: skip

#: Graphs as passes must not leave them.
PASSES = (
    Fault("fission -> normalise.beta", "", "scale", "proofs:test_passes.py"),
    Fault("fission -> normalise.mean", "", "beta", "tests/passes/test_every_pass.py"),
    Fault("fuse-statistics -> conv.statistics", "", "False", "tests/passes/test_every_pass.py"),
    Fault("fuse-normalise -> conv.act", "", "'identity'", "verify"),
    Fault("fuse-normalise -> conv.beta", "", "mean", "proofs:test_passes.py"),
    Fault("fuse-normalise -> conv.gate", "", "None", "verify"),
    Fault("fuse-residual -> residual.act", "", "'identity'", "proofs:test_passes.py"),
    Fault("fuse-residual -> residual.r_scale", "", "scale", "verify"),
    Fault("fuse-residual -> residual.gate", "", "None", "verify"),
    Fault("fuse-join -> conv.act", "", "'identity'", "proofs:test_passes.py"),
    Fault("eliminate-concat -> conv.visible", "", "visible - 1", "tests/passes/test_every_pass.py"),
)

#: Patterns that match too much, and questions about graphs that are answered wrongly.
PATTERNS = (
    Fault("_conv_module", 'if module.padding_mode != "zeros":', "if False:", "tests/passes/test_must_not_fire.py"),
    Fault("_batch_norm_module", "not module.training and module.running_mean is not None", "False", "tests/passes/test_must_not_fire.py"),
    Fault("_batch_norm_module", "if kind not in _BATCH_NORM_MODULES:", "if False:", "tests/passes/test_must_not_fire.py"),
    Fault("concat_of", 'values["dim"] != 1 or ', "", "tests/passes/test_must_not_fire.py"),
    Fault("add_of", "or node.kwargs", "", "tests/passes/test_must_not_fire.py"),
    Fault("_mean_of", "tuple(dims) not in _LAST_TWO_OF_FOUR", "False", "tests/passes/test_must_not_fire.py"),
    Fault("layers.py:_padding", "d * (k - 1)", "d * k", "tests/passes/test_must_not_fire.py"),
    Fault("handed_through", "and module.p != 0", "and False", "tests/passes/test_identities.py"),
    Fault("handed_through", 'values.get("train", values["training"])', "False", "tests/passes/test_identities.py"),
    Fault("written_out", "set(n.users) <= {*inside, node}", "True", "tests/passes/test_written_out.py"),
    Fault("_with_number", "value == number", "True", "tests/passes/test_written_out.py"),
    Fault("boundary_reason", "if parametrize.is_parametrized(module):", "if False:", "tests/passes/test_must_not_fire.py"),
    Fault("has_hooks", "", "return False", "tests/test_semantics_changes.py"),
    Fault("Reach._look_at_object", "self.objects[id(value)] = value", "pass", "tests/test_semantics_hooks.py"),
    Fault("Reach._look_at_function", "self.variables |=", "_ =", "tests/test_semantics_hooks.py"),
    Fault("_edits_at", "return in_place and", "return False and", "tests/test_semantics_hooks.py"),
    Fault("Written.note_reach", "self._objects |= reach.bound", "pass", "tests/test_semantics_around.py"),
    Fault("_keeping_tensors", "t.data.copy_(before)", "pass", "tests/test_semantics_around.py"),
    Fault("may_change_result", "", "return False", "tests/test_semantics_hooks.py"),
    Fault("_settings", "yield from sorted(reach.stored & (tensors | numbers))", "pass", "tests/test_semantics_hooks.py"),
    Fault("Recorder.call", "for n in {called, node}:", "for n in {called}:", "tests/test_semantics_around.py"),
    Fault("ModuleState._hooks_write", "return True", "pass", "tests/test_semantics_hooks.py"),
    Fault("cpu/memory.py:span", "x.is_neg()", "False", "tests/kernels/test_boundary.py"),
    Fault("_grown", "for part in parts[1:]:", "for part in reversed(parts[1:]):", "proofs:test_passes.py"),
    Fault("hand_on", 'behind_mean=behind_mean, behind_var=behind_var', 'behind_mean=behind_mean, behind_var=var', "proofs:test_passes.py"),
    Fault("merged_alone", "[*mean.users] == [*var.users] == [node]", "True", "tests/passes/test_every_pass.py"),
    Fault("_with_private_gradient", "", "return match", "tests/test_semantics_joins.py"),
    Fault("is_by_channel", "return by_channel and (", "return (", "tests/passes/test_excitation.py"),
    Fault("_expanded_like", "len(factor.users) != 1 or ", "", "tests/passes/test_excitation.py"),
    Fault("maker_for_one", "if len(tensor.users) != 1:", "if False:", "tests/passes/test_plain_sums.py"),
    Fault("_has_own_gradient", "", "return True", "tests/passes/test_activated_branches.py"),
    Fault("_gated_branches", 'and n.act == "identity"', "", "tests/passes/test_gated_sums.py"),
    Fault("sweeps:_is_of_images", "not factor.requires_grad and ", "", "tests/passes/test_stochastic_depth.py"),
    Fault("_is_drawn", "len(sources) != 1", "not sources", "tests/passes/test_stochastic_depth.py"),
    Fault("_writes_for_all", "if others and _gets_out(concat):", "if False:", "tests/passes/test_concat_slots.py"),
    Fault("unchain", "", "return", "tests/passes/test_concat_slots.py"),
    Fault("_of_both", "len(counts) == 1", "counts", "tests/passes/test_concat_slots.py"),
    Fault("zero_sum", "len(x.users) != 1", "False", "tests/passes/test_sums_with_zero.py"),
    Fault("_is_known_elsewhere", "", "return False", "tests/test_semantics_inplace.py"),
    Fault("SizeLog.decide", "self.decided = True", "self.decided = False", "tests/test_semantics_python.py"),
    Fault("still_hold", "", "return True", "tests/test_semantics_python.py"),
    Fault("normalise_after_split", "act=whole.act", "act='identity'", "tests/passes/test_normalised_splits.py"),
    Fault("_part", "parts, number", "parts, 0", "tests/passes/test_normalised_splits.py"),
    Fault("_is_4d", "", "return True", "tests/passes/test_must_not_fire.py"),
    Fault("is_homogeneous", "", "return True", "tests/passes/test_normalised_concats.py"),
)  # fmt: skip

#: The CPU kernels, in C++.
COMPILED = (
    Fault("statistics.h", "m2[c] += o.m2[c] + delta * delta * cross;", "m2[c] += o.m2[c];", "tests/kernels/test_cpu_sweeps.py"),
    Fault("statistics.h", "shift[c] = float(tile_mean);", "", "tests/kernels/test_cpu_sweeps.py"),
    Fault(
        "activation.h", "(state <= zero()) | (state >= set1(6.0f))", "(state < zero()) | (state >= set1(6.0f))",
        "tests/kernels/test_cpu_sweeps.py",
    ),
    Fault("finalize.cpp", "-scale * a->dbeta[c]", "scale * a->dbeta[c]", "tests/kernels/test_cpu_finalize.py"),
    Fault("join_pixels.cpp", "(image + 1) * join.image_pixels", "end", "tests/kernels/test_cpu_join.py"),
    Fault("finalize.cpp", "a->var[c] * a->unbias * a->momentum", "a->var[c] * a->momentum", "tests/kernels/test_cpu_finalize.py"),
    Fault("winograd_transforms.cpp", "transposed ? 8 - i : i", "i", "proofs:test_kernel_geometry.py"),
    Fault("winograd_transforms.cpp", "d[2 * step] = c - b", "d[2 * step] = b - c", "proofs:test_kernel_geometry.py"),
    Fault(
        "conv_geometry.cpp", "(p.in_width - 1 + p.padding_w) / column_step + 1", "(p.in_width + p.padding_w) / column_step + 1",
        "proofs:test_kernel_geometry.py",
    ),
    Fault("sweeps_normalise.cpp", "load(factors + c, lanes) * common", "common", "tests/kernels/test_cpu_sweeps.py"),
    Fault("sweeps_pool.cpp", "z > best, set1(position), at", "z >= best, set1(position), at", "tests/kernels/test_cpu_sweeps.py"),
    Fault(
        "sweeps_pool.cpp", "(h - a.kernel_h + a.stride_h) / a.stride_h", "(h - a.kernel_h) / a.stride_h",
        "tests/kernels/test_cpu_sweeps.py",
    ),
    Fault("join_pixels.cpp", "spr = fma(p, vr - v.tr.mean, spr);", "spr = fma(p, vr, spr);", "tests/kernels/test_cpu_sweeps.py"),
    Fault("depthwise_taps.h", "store(target, even + odd)", "store(target, even)", "proofs:test_kernel_geometry.py"),
)  # fmt: skip

#: The CUDA kernels, which run interpreted or on expressions here.
CUDA = (
    Fault("merged_tiles", "count * d * d", "d * d", "proofs:test_triton_formulas.py"),
    Fault("store_partial_statistics", "- count * remainder * remainder", "", "tests/cuda/interpreted/test_convolution.py"),
    Fault(
        "_residual_backward_kernel", "tl.where(inside, pull_back(g, u, ACT, SLOPE), 0.0)", "pull_back(g, u, ACT, SLOPE)",
        "proofs:test_triton_formulas.py",
    ),
    Fault("cuda/edges:output_gradient", "a *= 2.0 * rate", "a *= rate", "proofs:test_triton_formulas.py"),
    Fault("merged_tiles", "apart * apart * (total * share)", "apart * apart * share", "proofs:test_triton_formulas.py"),
    Fault("_add_up", "(tile < count)[:, None]", "(tile <= count)[:, None]", "proofs:test_triton_formulas.py"),
    Fault("cuda/edges:output_gradient", "tl.fma(y - mean, a, d + b)", "tl.fma(y, a, d + b)", "proofs:test_triton_formulas.py"),
    Fault("_finalize_kernel", "tl.load(batches_ptr) + 1", "tl.load(batches_ptr)", "proofs:test_triton_formulas.py"),
    Fault("first_read", "(dilation * (kernel - 1) - padding) // stride", "(kernel - 1 - padding) // stride", "proofs:test_cuda_ranges.py"),
    Fault("cuda/layout:_at", "(rows + 2**12)", "rows", "proofs:test_cuda_ranges.py"),
)  # fmt: skip

#: 1-D and 3-D data.
FOLDED = (
    Fault("Folding.transform", "images // max(x[0], 1)", "1", "tests/kernels/test_cpu_folded.py"),
    Fault("folding_of", "padding[0] == 0", "True", "proofs:test_kernel_geometry.py"),
)  # fmt: skip

FAULTS = (*FORMULAS, *NODES, *PASSES, *PATTERNS, *COMPILED, *CUDA, *FOLDED)
