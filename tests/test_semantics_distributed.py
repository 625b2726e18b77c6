"""DistributedDataParallel and SyncBatchNorm on two gloo processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import build, input_for
from torch import Tensor, distributed, multiprocessing, nn
from two_processes import WORLD, batch_for, loss_of, train_half

import bnrestructure
from bnrestructure.capture.program import Program
from bnrestructure.capture.regions import Options
from bnrestructure.ops.synchronise import synchronise
from bnrestructure.plan.survey import take_survey

# PyTorch can be built without gloo; its wheels for Linux have it, so in CI these run.
pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="this PyTorch has no gloo"
)


def _spawn(kind: str, name: str, folder: Path) -> list[dict[str, Tensor]]:
    (folder / "rendezvous").unlink(missing_ok=True)
    multiprocessing.spawn(train_half, (kind, name, str(folder)), nprocs=WORLD)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(WORLD)]


def _joint(name: str) -> dict[str, Tensor]:
    """One process, plain BatchNorm, the whole batch."""
    model, x = build(name), batch_for(name)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(model(x)).backward()
        optimiser.step()
    return model.state_dict()


def _assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-8, atol: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor.to(actual[key].dtype), rtol=rtol, atol=atol, msg=key)


def test_ddp_trains_as_eager_ddp(tmp_path: Path) -> None:
    expected, actual = _spawn("eager", "residual", tmp_path), _spawn("ddp", "residual", tmp_path)
    for e, a in zip(expected, actual, strict=True):
        _assert_close(a, e)


@pytest.mark.parametrize(("kind", "name"), [("sync", "residual"), ("sync-ragged", "dense")])
def test_sync_batch_norm_is_batch_norm_over_the_joint_batch(kind: str, name: str, tmp_path: Path) -> None:
    """Eager's SyncBatchNorm refuses CPU tensors, so the reference is one process with the whole batch."""
    expected = _joint(name)
    for actual in _spawn(kind, name, tmp_path):
        _assert_close(actual, expected)


@pytest.mark.whole
def test_both_in_float32_with_the_kernels_that_users_get(tmp_path: Path) -> None:
    expected, actual = _spawn("eager-float", "residual", tmp_path), _spawn("ddp-float", "residual", tmp_path)
    for e, a in zip(expected, actual, strict=True):
        _assert_close(a, e, rtol=1e-3, atol=1e-4)
    joint = _joint("residual")
    for synchronised in _spawn("sync-float", "residual", tmp_path):
        _assert_close(synchronised, joint, rtol=1e-3, atol=1e-4)


def test_sync_batch_norm_without_a_process_group_is_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("residual"))
    rewritten = bnrestructure.restructure(model, backend="reference")
    assert bnrestructure.explain(rewritten).counts["kept"] == 0
    (region,) = take_survey(rewritten, Options(), (input_for("residual"),)).regions
    assert Program(region.after, None, "a model").synchronises  # processes have to keep in step (capture/probation.py)
    x = input_for("residual")
    torch.testing.assert_close(rewritten(x), build("residual")(x), rtol=1e-9, atol=1e-9)


def test_synchronise_hands_back_its_arguments_on_a_single_rank() -> None:
    mean, var, size = torch.zeros(3), torch.ones(3), torch.Size((2, 3, 4, 4))
    assert synchronise(mean, var, size) == (mean, var, size)
