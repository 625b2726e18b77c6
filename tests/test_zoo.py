"""Every torchvision model with a batch norm layer: its sites as written down, its training step as eager's, its eval bit-identical.

``pytest -m zoo`` runs all of them in float64 (``-k resnet`` some) and one of each family in float32, too; ``pytest -m float32`` the others
in float32. Without a marker a few families' are trained, a step in float64.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest
import torch
import torchvision
from zoo_expected import EXPECTED
from zoo_models import TOO_LARGE, build_model, build_on_meta, inputs_for

import bnrestructure

#: One model of each family: two steps, and in float32, too.
_FAMILIES = (
    "densenet121", "efficientnet_b0", "fasterrcnn_mobilenet_v3_large_320_fpn", "googlenet", "lraspp_mobilenet_v3_large", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "quantized_shufflenet_v2_x0_5", "r3d_18", "regnet_y_400mf", "resnet18", "resnet50",
    "shufflenet_v2_x0_5", "vgg11_bn",
)  # fmt: skip

#: Verified in every run of the tests; ``make zoo`` has these, too, and all others.
_QUICK = ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5")

#: Those whose copies take gigabytes (wide_resnet101_2's 11.4 in both dtypes): one at a time, on the same worker, when several run.
_LARGE = (
    "densenet161", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn", "quantized_resnext101_32x8d", "quantized_resnext101_64x4d", "regnet_x_16gf",
    "regnet_x_32gf", "regnet_y_16gf", "resnext101_32x8d", "resnext101_64x4d", "s3d", "vgg11_bn", "vgg13_bn", "vgg16_bn",
    "vgg19_bn", "wide_resnet101_2", "wide_resnet50_2", "r2plus1d_18",
)  # fmt: skip

_MODELS = {n: pytest.param(n, marks=pytest.mark.xdist_group("large")) if n in _LARGE else n for n in EXPECTED}


@pytest.fixture(autouse=True)
def _memory_given_back() -> Iterator[None]:
    """What a model's copies took goes back to the system, where the other worker's next model looks for it.

    They are garbage in cycles, and glibc keeps what was freed.
    """
    yield
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def _verify(name: str, dtype: torch.dtype | None, steps: int = 2) -> None:
    inputs = inputs_for(name)
    report = bnrestructure.verify(build_model(name), inputs, backend="reference", steps=steps, dtype=dtype)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", _QUICK)
def test_family(name: str) -> None:
    """In float64: forward, all gradients, buffers and an SGD step to 1e-9; eval bit-identical."""
    _verify(name, torch.float64, steps=1)


@pytest.mark.zoo
@pytest.mark.parametrize("name", _MODELS.values())
def test_model(name: str) -> None:
    """One step of each, as above; two of one of each family, and in float32, too: no farther from the float64 truth than eager by the
    verifier's factor."""
    if name in TOO_LARGE:
        pytest.skip("too large for 24 GiB in float64: its sites are counted on the meta device")
    if name in _FAMILIES:
        _verify(name, None)
    else:
        _verify(name, torch.float64, steps=1)


@pytest.mark.float32
@pytest.mark.parametrize("name", [model for n, model in _MODELS.items() if n not in {*_FAMILIES, *TOO_LARGE}])
def test_model_in_float32(name: str) -> None:
    _verify(name, None)


def _check_counts(name: str) -> None:
    plan = bnrestructure.explain(build_on_meta(name), backend="reference")
    assert (len(plan.sites), *plan.counts.values()) == EXPECTED[name], plan.reasons
    assert all(site.reason for site in plan.sites if site.status != "fused")


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "googlenet", "r3d_18", "regnet_y_400mf", *_QUICK])
def test_sites_of_family(name: str) -> None:
    _check_counts(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", EXPECTED)
def test_sites(name: str) -> None:
    _check_counts(name)


@pytest.mark.zoo
def test_table_is_complete() -> None:
    from zoo_models import batch_norm_models

    assert list(EXPECTED) == batch_norm_models()
    assert set(EXPECTED) >= TOO_LARGE


def test_names_exist() -> None:
    assert len(EXPECTED) == 92
    assert set(EXPECTED) <= set(torchvision.models.list_models())


@pytest.mark.parametrize(("name", "sites"), [("resnet50", 53), ("densenet121", 121)])
def test_the_papers_two_models_keep_no_site(name: str, sites: int) -> None:
    assert EXPECTED[name][0] == sites
    assert EXPECTED[name][3] == 0


def test_densenets_concats_are_gone_and_its_statistics_are_computed_once() -> None:
    from bnrestructure.capture.regions import Options
    from bnrestructure.graph.ir import Conv, Statistics
    from bnrestructure.graph.provenance import provenance
    from bnrestructure.plan.survey import take_survey

    (region,) = take_survey(build_on_meta("densenet121"), Options("reference")).regions
    before, after = region.before, region.after

    def concats(gm: torch.fx.GraphModule) -> int:
        return sum(n.target is torch.cat and not provenance(n).vector for n in gm.graph.nodes)

    assert concats(before) == 62
    assert concats(after) == 0
    sweeps = Statistics.every(after.graph)
    carried = [conv for conv in Conv.every(after.graph) if conv.statistics]
    # Every convolution's output once, the stem's pool and the three transitions' pools in sweeps of their own.
    assert (len(carried), len(sweeps)) == (1 + 58 * 2, 4)
