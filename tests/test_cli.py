"""The command line: what each subcommand prints, its exit status, and one line for everything that cannot be done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_no_gpu
from torch import nn

import bnrestructure
from bnrestructure.cli.main import main
from bnrestructure.cli.options import input_size
from bnrestructure.kernels import registry, tuning
from bnrestructure.models import inputs as example
from bnrestructure.models.models import load_model

MODELS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def lonely():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Tanh())

def pair():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, a, b):
            return self.body(a + b)

    return Pair()

def pair_inputs():
    return torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)

def fails():
    raise ValueError("the weights are missing" + chr(10) + "second line")

def exits():
    raise SystemExit(3)

def three():
    return 3

instance = net()
text = "not a function"
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of factories, in the current folder."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return "my_models.py"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from bnrestructure.cli.main import main\n"
    code += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    for name in ("show", "plan", "verify", "bench", "doctor"):
        assert f"    {name} " in done.stdout


def test_version_and_missing_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"bnrestructure {bnrestructure.__version__}\n")
    status, _, err = run(capsys)
    assert status == 2
    assert "COMMAND" in err


def test_plan(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "plan", f"{models}:net", "--backend", "reference", "--batch", "2", "--input-size", "10"
    )
    assert status == 0
    assert "Sequential: 1 BN layers, 1 fused, 0 partial, 0 kept (100% fully fused)" in out
    assert "2x4x8x8 float32" in out
    assert "conv-bn-relu-conv" in out
    assert "13 -> 2" in out


def test_plan_as_json(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", "my_models:net", "--backend", "reference", "--json", "--passes", "rcf")
    assert status == 0
    plan = json.loads(out)
    assert plan["counts"] == {"fused": 0, "partial": 0, "kept": 1}
    assert plan["sites"][0]["shape"] == [32, 4, 222, 222]


def test_plan_strict_is_a_check(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "plan", f"{models}:net", "--backend", "reference", "--strict")[0] == 0
    assert run(capsys, "plan", f"{models}:lonely", "--backend", "reference", "--strict")[0] == 1


def test_plan_of_a_model_without_batch_norm(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", f"{models}:plain", "--backend", "reference")
    assert status == 0
    assert "0 BN layers" in out


def test_verify(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "verify", f"{models}:net", "--backend", "reference", "--input-size", "3x9x7")
    assert status == 0
    assert "Sequential: equivalent" in out
    assert err == ""
    status, out, _ = run(
        capsys, "verify", f"{models}:pair", "--inputs", f"{models}:pair_inputs", "--backend", "reference", "--json"
    )
    assert status == 0
    assert json.loads(out)["ok"] is True


def test_verify_says_what_is_wrong(
    models: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnrestructure.kernels import reference
    from bnrestructure.kernels.calls import FinalizeBackward

    original = reference.RUN[FinalizeBackward]
    monkeypatch.setitem(reference.RUN, FinalizeBackward, lambda call: tuple(t * 1.01 for t in original(call)))
    status, out, _ = run(
        capsys,
        "verify",
        f"{models}:net",
        "--backend",
        "reference",
        "--input-size",
        "8",
        "--steps",
        "1",
        "--dtype",
        "fp64",
    )
    assert status == 1
    assert "NOT equivalent" in out
    assert "float64, step 1: gradient" in out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        found["packages"]["torch"]
    )
    assert found["kernels"]["reference"] == {"available": True, "reason": None, "description": None}
    assert found["kernels"]["cpu"]["reason"] == registry.unavailable_reason("cpu")
    assert found["cuda"]["available"] == torch.cuda.is_available()
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    if not torch.cuda.is_available():
        assert "none: PyTorch" in out
    assert "timm" in out


def test_doctor_names_no_file_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", str(tmp_path))
    assert tuning.where_kept() == "nothing measured yet (tune)"
    file = tuning.cache_file()
    assert file is not None
    file.touch()
    assert tuning.where_kept() == f"measured choices in {file}"
    monkeypatch.setenv("BNRESTRUCTURE_CACHE", "off")
    assert tuning.where_kept() == "measured choices are not kept"


def test_doctor_gives_the_reason_of_missing_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "unavailable_reason", lambda name: None if name == "reference" else f"no {name} here")
    _, out, _ = run(capsys, "doctor")
    assert "cannot run: no cpu here" in out
    assert "cannot run: no cuda here" in out


MISUSE = {
    "unknown model": (("plan", "resnet81"), "unknown model 'resnet81'; did you mean 'resnet18'"),
    "nothing like it": (("plan", "zzzzzz"), "unknown model 'zzzzzz'; torchvision.models.list_models()"),
    "no such file": (("show", "my_model.py:net"), "there is no file my_model.py; did you mean 'my_models.py'"),
    "no such module": (
        ("verify", "my.thing:net"),
        "importing my.thing raised ModuleNotFoundError: No module named 'my'",
    ),
    "no such factory": (("verify", "my_models.py:nett"), "my_models.py has no 'nett'; did you mean 'net'"),
    "not a function": (
        ("verify", "my_models.py:text"),
        "my_models.py:text is a str, expected a function that returns a model",
    ),
    "a factory that raises": (
        ("plan", "my_models:fails"),
        "my_models:fails raised ValueError: the weights are missing",
    ),
    "a factory that exits": (("plan", "my_models:exits"), "my_models:exits raised SystemExit: 3"),
    "no factory named": (("plan", "my_models.py"), "which model of my_models.py? Name the function that returns it"),
    "nothing before the colon": (("plan", ":net"), "expected package.module:factory or file.py:factory, got ':net'"),
    "nothing after the colon": (("plan", "my_models.py:"), "expected package.module:factory or file.py:factory"),
    "not a Module": (("plan", "my_models:three"), "my_models:three returned int, expected a torch.nn.Module"),
    "timm missing": (("plan", "timm:resnet18"), "timm:resnet18 needs the timm package"),
    "wrong shape, plan": (
        ("plan", "my_models:net", "--input-size", "4x8x8"),
        "the model does not take this input (32x4x8x8): Given groups=1, weight of size [4, 3, 3, 3]",
    ),
    "wrong shape, verify": (
        ("verify", "my_models:net", "--input-size", "4x8x8"),
        "the original model fails on these inputs",
    ),
    "too small for its kernels": (
        ("plan", "my_models:net", "--input-size", "3", "--backend", "auto"),
        "the model does not take this input (32x3x3x3)",
    ),
    "too many dimensions": (("plan", "my_models:net", "--input-size", "3x4x8x8"), "3x4x8x8 has a dimension too many"),
    "a batch beyond memory": (
        ("verify", "my_models.py:net", "--batch", "99999999999"),
        "an input of 99999999999x3x64x64 takes 4,915,199 GB, and this machine has",
    ),
    "a size beyond memory": (("plan", "my_models:net", "--input-size", "99999999"), "an input of 32x3x99999999x99999999 takes"),
    "a detection batch beyond memory": (("plan", "fasterrcnn_resnet50_fpn", "--batch", "99999999999"), "an input of 99999999999x3x320x320"),
    "unknown backend": (("plan", "my_models:net", "--backend", "refrence"), "did you mean 'reference'"),
    "unknown pass": (("show", "my_models:net", "--passes", "fision"), "did you mean 'fission'"),
    "unknown device": (("verify", "my_models:net", "--device", "tpu"), "unknown device 'tpu'"),
    "negative steps": (("verify", "my_models:net", "--steps", "-1"), "steps must be at least 0"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_one_line_and_status_2(case: str, models: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISUSE[case]
    if case == "timm missing" and _installed("timm"):
        pytest.skip("timm is installed")
    if "--backend" not in arguments:
        arguments = (*arguments, "--backend", "reference")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"bnrestructure {arguments[0]}: ")
    assert message in err
    assert err.count("\n") == 1


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@needs_no_gpu
@pytest.mark.parametrize("option", ["--backend", "--device"])
def test_cuda_without_a_gpu(option: str, models: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "verify", f"{models}:net", option, "cuda")
    assert status == 2
    assert "PyTorch sees no CUDA device here" in err


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--input-size", "big"), ("--dtype", "int8")])
def test_arguments_that_do_not_parse(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "verify", "resnet18", *arguments)
    assert status == 2
    assert f"argument {arguments[0]}" in err


def test_a_script_module_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scripted.py"
    path.write_text(
        "import torch, warnings\n"
        "def net():\n"
        "    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('ignore')\n"
        "        return torch.jit.script(torch.nn.Conv2d(1, 1, 1))\n"
    )
    status, _, err = run(capsys, "plan", f"{path}:net")
    assert status == 2
    assert "is a ScriptModule: restructure it before torch.jit.script" in err


def test_an_instance_and_a_class_are_models_too(models: str) -> None:
    assert isinstance(load_model(f"{models}:instance"), nn.Sequential)
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)


def test_input_sizes_are_parsed() -> None:
    assert input_size("224") == (224,)
    assert input_size("3x16x112X112") == (3, 16, 112, 112)


FAMILIES: dict[str, Any] = {
    "resnet18": [(2, 3, 224, 224)],
    "inception_v3": [(2, 3, 299, 299)],
    "vit_b_16": [(2, 3, 224, 224)],
    "fcn_resnet50": [(2, 3, 224, 224)],
    "r3d_18": [(2, 3, 16, 112, 112)],
    "raft_small": [(2, 3, 128, 128), (2, 3, 128, 128)],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_torchvision_model_has_inputs(name: str) -> None:
    with torch.device("meta"):
        model = load_model(name) if name.startswith("vit") else None
    made = example.example_inputs(name, model, batch=2, size=None, source=None)
    assert [tuple(t.shape) for t in made] == FAMILIES[name]


def test_detection_models_get_images_and_targets() -> None:
    images, targets = example.example_inputs(
        "keypointrcnn_resnet50_fpn", None, batch=2, size=(64,), source=None, small=True
    )
    assert [tuple(i.shape) for i in images] == [(3, 64, 64), (3, 56, 64)]
    for image, target in zip(images, targets, strict=True):
        boxes = target["boxes"]
        assert bool((boxes[:, 2:] > boxes[:, :2]).all())
        assert bool((boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all())
        assert set(target) == {"boxes", "labels", "masks", "keypoints"}


def test_a_detection_model_is_planned_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    status, out, _ = run(capsys, "plan", name, "--backend", "reference", "--batch", "1", "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["regions"] == ["backbone"]
    assert plan["counts"]["kept"] == 0
    status, out, _ = run(capsys, "show", name, "--backend", "reference")
    assert status == 0
    assert "region backbone" in out
