"""The documentation: nothing public without a docstring, every reason of a plan explained, its generated parts up to date."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import bnrestructure
from bnrestructure.capture.spelling import REFUSED, VALUES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
SOURCES = sorted(p for folder in ("bnrestructure", "passes", "patterns") for p in (ROOT / folder).rglob("*.py"))


def undocumented(path: Path) -> list[str]:
    """Public names of a module without a docstring: what __all__ lists, and the public methods of its classes."""
    tree = ast.parse(path.read_text())
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    listed = {
        name for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for name in ast.literal_eval(node.value)
    }  # fmt: skip
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in listed:
            continue
        if not ast.get_docstring(node) and "overload" not in map(ast.unparse, node.decorator_list):
            missing.append(node.name)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            if public and not ast.get_docstring(method) and not _overrides(method):
                missing.append(f"{node.name}.{method.name}")
    return missing


def _overrides(method: ast.FunctionDef) -> bool:
    """PyTorch's own method names, documented there, and a Protocol's, which its docstring describes."""
    stub = [ast.unparse(statement) for statement in method.body] == ["..."]
    pytorchs = ("forward", "backward", "setup_context", "run_node", "call_module", "create_arg", "is_leaf_module")
    return stub or method.name in pytorchs


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_public_is_undocumented(path: Path) -> None:
    assert undocumented(path) == []


def test_the_check_of_docstrings_sees_what_is_missing(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('__all__ = ["a", "B"]\ndef a(): pass\nclass B:\n    """B."""\n    def c(self): pass\n    def _d(self): pass\n')
    assert undocumented(module) == ["the module", "a", "B.c"]


@pytest.mark.parametrize("name", bnrestructure.__all__)
def test_the_reference_has_every_public_name(name: str) -> None:
    assert re.search(rf":: bnrestructure\.{name}$", (DOCS / "api.md").read_text(), re.M)
    found = getattr(bnrestructure, name)
    assert inspect.getdoc(found)
    for attribute, value in vars(found).items() if isinstance(found, type) else ():
        if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{attribute}"


# --- reasons ----------------------------------------------------------------------------------------------------------


def documented_reasons() -> list[re.Pattern[str]]:
    """The terms of docs/reasons.md; … stands for anything."""
    page = (DOCS / "reasons.md").read_text()
    terms = re.findall(r"^(`.+`)(?:, `.+`)*\n: ", page, re.M)
    phrases = [phrase for term in re.findall(r"^(`.+)\n: ", page, re.M) for phrase in re.findall(r"`([^`]+)`", term)]
    assert len(terms) > 20
    return [re.compile(".*".join(map(re.escape, phrase.split("…")))) for phrase in phrases]


def explained(reason: str, known: list[re.Pattern[str]]) -> bool:
    """Each part of a reason begins as a documented one does."""
    return all(any(pattern.match(part) for pattern in known) for part in reason.split("; "))


@pytest.mark.parametrize("name", [
    "densenet121", "efficientnet_v2_s", "shufflenet_v2_x1_0", "googlenet", "maxvit_t", "r3d_18", "ssdlite320_mobilenet_v3_large",
])  # fmt: skip
def test_reasons_of_plans_are_explained(name: str) -> None:
    with torch.device("meta"):
        options = {"init_weights": False} if name == "googlenet" else {"weights_backbone": None} if "ssd" in name else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    known = documented_reasons()
    reasons = bnrestructure.explain(model, backend="reference").reasons
    assert reasons
    assert [reason for reason in reasons if not explained(reason, known)] == []


def test_reasons_in_the_sources_are_explained() -> None:
    """Every literal that is handed to a Refusal or an error of capture, that a region refuses with, or that makes a module a boundary."""
    known = documented_reasons()
    found = []
    folders = (ROOT / "patterns", ROOT / "bnrestructure" / "capture", ROOT / "bnrestructure" / "plan")
    for path in (file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in _GIVES_A_REASON:
                last = node.args[-1]
                found += [text for part in (last.values if isinstance(last, ast.BoolOp) else [last]) if (text := _literal(part))]
    boundaries = ast.parse((ROOT / "bnrestructure" / "graph" / "boundaries.py").read_text())
    found += [text for node in ast.walk(boundaries) if isinstance(node, ast.Return) and node.value and (text := _literal(node.value))]
    found.remove("its forward x")  # whatever stands in a table
    found += [f"its forward {what}" for what in REFUSED.values()]
    assert len(found) >= 20
    in_sweeps = [f"its statistics take a sweep: {text}" for text in found]
    assert [text for text, swept in zip(found, in_sweeps, strict=True) if not explained(text, known) and not explained(swept, known)] == []


_GIVES_A_REASON = ("Refusal", "CaptureError", "NotFollowedError", "AttributeWrittenError", "_refuse", "give_up")


def _name(function: ast.expr) -> str:
    return str(getattr(function, "id", None) or getattr(function, "attr", ""))


def _literal(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        named = {"VALUES": VALUES}
        return "".join(str(v.value) if isinstance(v, ast.Constant) else named.get(_name(v.value), "x") for v in node.values)  # type: ignore[attr-defined]
    return None


# --- what the site is built with --------------------------------------------------------------------------------------


def test_docstrings_become_rst() -> None:
    from docstrings import to_rst

    assert to_rst(["Does it.", "", "name, other    what *it* is,", "               and more", "b    more", "", "Raises x_."]) == [
        "Does it.", "", "``name, other``", r"    what \*it\* is,", "    and more", "``b``", "    more", "", "", r"Raises x\_.",
    ]  # fmt: skip
    assert to_rst(["As here::", "", "    a  =  b_", "", "Then ``c * d`` and a|b."]) == [
        "As here::", "", "    a  =  b_", "", r"Then ``c * d`` and a\|b.",
    ]  # fmt: skip


def test_every_pass_has_a_page_and_a_picture() -> None:
    from pass_pictures import PICTURED

    from bnrestructure.passes.pipeline import PASSES

    assert set(PICTURED) == set(PASSES)
    for name in PASSES:
        assert f"generated/passes/{name}.html" in (DOCS / "how-it-works" / f"{name}.md").read_text()


def test_the_glossary_has_the_words() -> None:
    page = (DOCS / "glossary.md").read_text()
    for word in ("site", "sweep", "edge", "gain", "chain", "fission", "RCF", "MVF", "BNFF", "ICF", "prologue", "epilogue"):
        assert re.search(rf"^{word}$", page, re.M)
