"""The kernels compiled ahead of time, without a GPU: registers, spills, shared memory and tensor-core instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from needs import needs_triton

from bnrestructure.kernels.cuda.rule import ISSUED, ISSUED_BY_WGRAD, step_cycles

pytestmark = needs_triton

COMMAND = [sys.executable, "-m", "bnrestructure.kernels.cuda.compile_ahead"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)


def of_the_table(test: Callable[..., None]) -> Callable[..., None]:
    """They share a minute's compilation: on one worker, where pytest-xdist's groups work (3.8 beside pytest 9.2 ignores them)."""
    return pytest.mark.whole(pytest.mark.xdist_group("compiled kernels")(test))


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    """Representative variants for sm_80 and sm_90, one for the other parts (the command without --quick has all)."""
    found = run("--quick", "--json")
    assert found.returncode in (0, 1), found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@of_the_table
def test_every_part_and_on_sm_90_every_kernel_is_compiled(table: list[dict[str, Any]]) -> None:
    assert {row["part"] for row in table} == {80, 86, 89, 90, 100, 120}
    kernels = {row["kernel"] for row in table if row["part"] == 90}
    assert kernels == {
        "dense_forward_kernel", "dense_dgrad_kernel", "dense_wgrad_kernel",
        "depthwise_forward_kernel", "depthwise_dgrad_kernel", "depthwise_wgrad_kernel",
        "statistics_kernel", "statistics_backward_kernel", "merge_kernel",
        "finalize_kernel", "finalize_backward_kernel",
        "normalise_kernel", "normalise_backward_kernel", "gated_backward_kernel", "residual_kernel", "residual_backward_kernel",
        "output_gradient_kernel", "sums_kernel", "squeeze_kernel", "max_pool_kernel", "max_pool_backward_kernel",
    }  # fmt: skip


@of_the_table
def test_no_kernel_has_a_fault(table: list[dict[str, Any]]) -> None:
    """No spills, shared memory within the part's limit, and products on tensor cores (warp-group ones on sm_90)."""
    assert {row["variant"] + " " + row["kernel"]: row["complaints"] for row in table if row["complaints"]} == {}


@of_the_table
def test_warp_group_instructions_on_sm_90(table: list[dict[str, Any]]) -> None:
    dense = [row for row in table if row["part"] == 90 and row["kernel"].startswith("dense")]
    assert len(dense) >= 9
    assert all(row["instructions"]["HGMMA"] > 0 for row in dense)


#: Of the quick variants on sm_90: kernel, and the kind of step in the rule of kernels/cuda/rule.py.
STEPS = {
    "1x1 bf16": {"dense_forward_kernel": "prologue", "dense_dgrad_kernel": "dgrad", "dense_wgrad_kernel": "wgrad of both"},
    "3x3 stride 2 bf16": {
        "dense_forward_kernel": "masked prologue",
        "dense_dgrad_kernel": "masked dgrad",
        "dense_wgrad_kernel": "masked wgrad of both",
    },
    "1x1 join bf16": {"dense_forward_kernel": "join", "dense_dgrad_kernel": "join dgrad", "dense_wgrad_kernel": "wgrad"},
}


@of_the_table
def test_the_rule_knows_how_long_the_loops_are(table: list[dict[str, Any]]) -> None:
    """The largest specialisation of each, but for a second batch norm in a join."""
    found: dict[str, float] = {}
    for row in table:
        kind = STEPS.get(row["variant"], {}).get(row["kernel"])
        if row["part"] == 90 and kind is not None and not (kind == "join" and kind in found):
            rows, columns, depth = map(int, row["tile"].split("x"))
            found[kind] = max(found.get(kind, 0.0), row["cycles"] / step_cycles(kind, rows, columns, depth))
            if kind in ISSUED:
                ends = (row["prologue"] + row["epilogue"]) * row["warps"] / 4
                assert 0.8 < ends / (ISSUED[kind].fixed * rows * columns / 128**2) < 1.25, (kind, ends)
    assert found.keys() == {kind for kinds in STEPS.values() for kind in kinds.values()} <= ISSUED.keys() | ISSUED_BY_WGRAD.keys()
    assert all(0.85 < ratio < 1.2 for ratio in found.values()), found


@of_the_table
@pytest.mark.parametrize("variant", ["1x1 bf16", "1x1 channels in eights bf16", "depthwise channels in eights bf16", "1x1 gate silu bf16"])
def test_channels_are_accessed_several_at_once(table: list[dict[str, Any]], variant: str) -> None:
    """72 and 24 channels are not multiples of 16, which is all that Triton looks for by itself."""
    narrow = {row["kernel"]: row["narrow"] for row in table if row["variant"] == variant}
    assert len(narrow) >= 3
    assert set(narrow.values()) == {0}, narrow


@of_the_table
def test_numbers_are_rounded_two_at_a_time(table: list[dict[str, Any]]) -> None:
    """But for a max pool's, which are compared one by one, and a squeeze's averages."""
    kernels = {row["kernel"] for row in table if row["part"] == 90 and row["single"]}
    assert kernels <= {"max_pool_kernel", "squeeze_kernel"}, kernels
    assert any(row["single"] for row in table if row["kernel"] == "max_pool_kernel")  # it would be seen


def test_the_unit_of_a_kernel_divides_its_sizes() -> None:
    from bnrestructure.kernels.cuda.problem import unit_of

    assert unit_of(64, 128, 0) == 1  # Triton sees as much
    assert unit_of(72, 24, 64, 0) == 8
    assert unit_of(24, 20) == unit_of(32, 4) == 4
    assert unit_of(24, 18) == unit_of(1, 8) == 1


def test_misuse_is_told() -> None:
    assert run(TRITON_INTERPRET="1").returncode == 2
    found = run("--only", "no such variant")
    assert found.returncode == 2
    assert "1x1 bf16" in found.stderr
