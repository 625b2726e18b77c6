"""verify(): the restructured model against the original in float64, and against eager's error in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.api import explain, restructure, unrestructure
from bnrestructure.capture.swap import is_restructured, original_class
from bnrestructure.core.errors import UsageError, first_line
from bnrestructure.core.generators import preserved_generators
from bnrestructure.kernels.proof.prover import waiting_for_proofs
from bnrestructure.verification.draws import seeded
from bnrestructure.verification.judge import FLOAT64_LIMIT, judge_double, judge_training
from bnrestructure.verification.loss import default_loss, named_tensors
from bnrestructure.verification.own_draws import compare_draws
from bnrestructure.verification.report import Comparison, VerificationReport
from bnrestructure.verification.run import as_dtype
from bnrestructure.verification.trial import Setting, Trial, run_rounded, run_trial

__all__ = ["verify"]

#: How many more trials are made when the first exceeds a limit in the training dtype.
_MORE_TRIALS = 4
#: How often the original runs beside itself when the first trial exceeds a limit in float64.
_ROUNDED_RUNS = 3


def verify(
    model: nn.Module,
    inputs: Any,
    *,
    targets: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    backend: str | None = None,
    passes: str | Sequence[str] | None = None,
    steps: int = 2,
    dtype: torch.dtype | None = None,
    factor: float = 2.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Check that restructuring does not change what the model computes. The model is left untouched, random generators
    too.

    The oracle is the *original* model in float64. Deep copies are trained side by side for ``steps`` SGD steps (0: one
    forward and backward pass alone), each step as long as 1e-3 of the parameters. Compared at each: outputs, the
    gradient of every parameter and of every floating input, every buffer, and the parameters after the step.

    float64         The restructured copy in float64: relative error at most 1e-9. If a tensor is beyond it, the original runs thrice
                    beside itself with every operation's result rounded at random (verification/rounding.py); where that alone goes
                    further than the limit, ``factor`` times as far is the limit, and a note says so.
    training dtype  The restructured copy's distance to the float64 truth is at most ``factor`` times eager's own
                    distance plus 4 machine epsilons. Eager's distance on a tensor is the larger of that tensor's and
                    the quadratic mean over its kind (one lucky tensor is no measure). A value within rounding of a
                    ReLU's kink may land on either side, in either model: if a tensor is beyond its limit, four more
                    trials are made on parameters and inputs perturbed by one rounding each, eager in channels_last in
                    every other one (its rounding depends on the memory format, and ours is always that one), and our
                    median is held against eager's largest. Skipped for ``dtype=torch.float64`` and for a model in float64.
    draws           Where the model draws random numbers (dropout), one forward pass of each in float64 from the same seed, with
                    the draws that the model itself makes: the outputs agree, and so does the generator afterwards.
    eval            After training, the eval-mode forwards of the restructured copy and of an original that loaded its
                    state_dict (strictly) are bit-identical.

    A relative error divides by ``max(||t||, 1e-3 * r * sqrt(numel))``, r being the largest root mean square among
    tensors of that kind; see verification/distance.py for why. NaN and infinity must stand in the same places as in eager, and
    the same outputs need a gradient.
    Elsewhere dropout draws the same numbers in every run, whatever the dtype and memory format.

    It fails, too, when nothing of the restructured copy ran rewritten although the plan has batch norms that are to be.

    model      plain, or restructured (then with its own backend and passes unless others are given); if in eval mode,
               ``train()`` is used
    inputs     a tensor or a tuple of arguments (a detection model's ``(images, targets)``), float tensors in the
               model's dtype
    loss_fn    ``loss_fn(output)``, or ``loss_fn(output, targets)`` when targets are given; by default outputs times
               fixed random cotangents, or the sum of a dict of losses
    dtype      the training dtype: None for the model's own; bfloat16 and float16 mean autocast over float32
    progress   called with a few words before each part of the work

    Contexts that the caller is in, ``torch.autocast`` or ``torch.no_grad``, do not reach the runs.

    Raises UsageError for arguments that cannot be used, and when the original model itself fails on these inputs.
    """
    arguments = _checked(model, inputs, steps, factor, dtype)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    cast, autocast = (own, None) if dtype is None else (torch.float32, dtype) if dtype.itemsize < 4 else (dtype, None)
    loss = default_loss if loss_fn is None else (loss_fn if targets is None else lambda out: loss_fn(out, targets))
    setting = Setting(loss, steps, seed, cast, autocast, progress or (lambda _: None))
    with preserved_generators(), waiting_for_proofs(), _plain_context(model):
        original, candidate = _pair(model, backend, passes)
        plan = explain(candidate, backend=backend or "auto", passes=passes)
        report = VerificationReport(original_class(model).__name__, factor, sites=plan.counts, notes=list(plan.notes))
        training = cast != torch.float64
        trial = run_trial(original, candidate, arguments, setting, double=True, training=training)
        double, trials = judge_double(trial, [], factor), [trial]
        if not all(c.ok for c in double) and trial.raised is None:
            double = judge_double(trial, _rounded(original, arguments, setting), factor)
            if any(c.limit > FLOAT64_LIMIT for c in double):
                report.notes.append(_ill_conditioned(double))
        judged = judge_training(trials, setting.dtype, factor)
        if all(c.ok for c in double) and not all(c.ok for c in judged) and trial.raised is None:
            for i in range(_MORE_TRIALS):
                setting.say(f"trial {i + 2} of {_MORE_TRIALS + 1}, perturbed by one rounding")
                nudged = _nudged(original, candidate, arguments, setting, i + 1)
                try:
                    another = run_trial(*nudged, setting, double=False, training=True, eager_channels_last=i % 2 == 1)
                except UsageError:  # a view() that only one memory format allows
                    another = run_trial(*nudged, setting, double=False, training=True)
                trials.append(another)
            judged = judge_training(trials, setting.dtype, factor)
            report.notes.append(f"{len(trials)} trials were made in the training dtype, for the first exceeded a limit")
        report.comparisons = [*double, *judged]
        report.notes += _undecided(judged)
        for stage, step, message in (t.raised for t in trials if t.raised is not None):
            report.comparisons.append(Comparison(stage, step, "error", message, math.inf, 0.0))
        if trial.trained is not None:
            _note_what_ran(report, trial.trained)
            setting.say("the model's own random numbers")
            compare_draws(report, original, candidate, arguments, setting)
            setting.say("eval mode")
            _compare_eval(report, original, trial.trained, arguments)
    return report


def _note_what_ran(report: VerificationReport, trained: nn.Module) -> None:
    """The report's sites are those that ran rewritten; that none did where some should have is an error."""
    planned, ran = report.sites, explain(trained)
    report.sites = ran.counts
    report.notes += [note for note in ran.notes if note not in report.notes]
    if planned["fused"] + planned["partial"] and not any(site.ran for site in ran.sites):
        reasons = list(ran.reasons) or ["no part of it was called"]
        what = f"nothing ran rewritten, although {planned['fused'] + planned['partial']} batch norms were to be: {reasons[0]}"
        report.comparisons.append(Comparison("float64", 1, "error", what, math.inf, 0.0))


def _checked(model: Any, inputs: Any, steps: int, factor: float, dtype: torch.dtype | None) -> tuple[Any, ...]:
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if steps < 0 or factor < 1:
        raise UsageError(f"steps must be at least 0 and factor at least 1, got steps={steps}, factor={factor}")
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating dtype, got {dtype}")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError("the model is on the meta device and has no values to compare")
    return inputs if isinstance(inputs, tuple) else (inputs,)


@contextmanager
def _plain_context(model: nn.Module) -> Iterator[None]:
    """With gradients, and without the autocast of any device that the model is on."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _pair(model: nn.Module, backend: str | None, passes: str | Sequence[str] | None) -> tuple[nn.Module, nn.Module]:
    """(the original, the restructured candidate), deep copies in training mode."""
    try:
        candidate = copy.deepcopy(model)
    except Exception as error:  # a user's __deepcopy__ or __reduce__ may raise anything
        raise UsageError(f"the model cannot be deep-copied: {first_line(error)}") from error
    original = unrestructure(copy.deepcopy(candidate))
    restructured = any(is_restructured(m) for m in candidate.modules())
    if not restructured or backend is not None or passes is not None:
        restructure(candidate, backend=backend or "auto", passes=passes)
    if not model.training:
        original.train()
        candidate.train()
    return original, candidate


def _nudged(
    original: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], setting: Setting, seed: int
) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """The same problem with every parameter and floating input multiplied by 1 + eps * u, u uniform in [-1, 1]."""
    eps = torch.finfo(setting.dtype).eps
    generator = torch.Generator().manual_seed(seed)

    def nudge(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        u = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (t.detach().double() * (1 + eps * u.to(t.device))).to(t.dtype)

    models = [copy.deepcopy(m).to(setting.cast) for m in (original, candidate)]
    with torch.no_grad():
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            q.copy_(p.copy_(nudge(p)))
    return models[0], models[1], pytree.tree_map_only(Tensor, nudge, as_dtype(inputs, setting.cast))


def _rounded(original: nn.Module, inputs: tuple[Any, ...], setting: Setting) -> list[Trial]:
    """The original beside itself in float64, rounded at random, a few times."""
    found = []
    for i in range(_ROUNDED_RUNS):
        setting.say(f"the original beside itself, rounded at random, {i + 1} of {_ROUNDED_RUNS}")
        found.append(run_rounded(original, inputs, setting, i))
    return found


def _ill_conditioned(double: list[Comparison]) -> str:
    """The note that some limits in float64 are the model's own."""
    of = [c for c in double if c.limit > FLOAT64_LIMIT]
    worst = max(of, key=lambda c: c.limit)
    return (
        f"ill-conditioned: control {worst.eager_error:.1e} (so far the original moves in float64 when its results are rounded at random: "
        f"step {worst.step}, {worst.kind} {worst.name}); {len(of)} of {len(double)} limits follow from that"
    )


def _undecided(judged: list[Comparison]) -> list[str]:
    """The note that the training dtype decides nothing about some tensors, or none."""
    without = [c for c in judged if math.isinf(c.limit)]
    if not without:
        return []
    worst = max(without, key=lambda c: c.eager_error or 0.0)
    return [
        f"ill-conditioned: {worst.stage} decides nothing about {len(without)} of {len(judged)} tensors, for most of their kind are further "
        f"off in the original itself than they are large ({worst.eager_error:.1e}: step {worst.step}, {worst.kind} {worst.name})"
    ]


def _compare_eval(report: VerificationReport, original: nn.Module, trained: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Eval-mode forwards must agree bit for bit, after the state of training went over by state_dict."""
    dtype = next((p.dtype for p in trained.parameters() if p.is_floating_point()), torch.get_default_dtype())
    plain = copy.deepcopy(original).to(dtype)

    def wrong(what: str) -> None:
        report.comparisons.append(Comparison("eval", 0, "error", what, math.inf, 0.0))

    try:
        plain.load_state_dict(trained.state_dict(), strict=True)
    except RuntimeError as error:
        return wrong(f"the restructured model's state_dict does not fit the original: {first_line(error)}")
    outputs = []
    for module in (plain.eval(), trained.eval()):
        arguments = pytree.tree_map_only(Tensor, torch.clone, as_dtype(inputs, dtype))
        seeded(0)
        try:
            with torch.no_grad():
                outputs.append(named_tensors(module(*arguments), "output"))
        except Exception as error:  # some models only train; what matters is whether both fail or ours alone
            if module is not plain:
                return wrong(f"the restructured model raised {type(error).__name__} in eval mode: {first_line(error)}")
            report.notes.append(f"eval mode was not compared: the original fails there: {first_line(error)}")
            return None
    for name in dict.fromkeys([*outputs[0], *outputs[1]]):
        a, b = outputs[0].get(name), outputs[1].get(name)
        same = a is not None and b is not None and _bit_identical(a, b)
        report.comparisons.append(Comparison("eval", 0, "output", name, 0.0 if same else math.inf, 0.0))
    return None


def _bit_identical(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
