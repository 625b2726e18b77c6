"""A benchmark's figures as tables for a terminal, and its verdict in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bnrestructure.bench.contenders import RESTRUCTURED
from bnrestructure.bench.kinds import KINDS, total

__all__ = ["ratio_text", "render", "verdicts"]


def render(console: Console, result: dict[str, Any]) -> None:
    """Print everything that was measured, the verdict last."""
    environment, settings = result["environment"], result["settings"]
    size = "" if settings["input_size"] is None else f", input {'x'.join(map(str, settings['input_size']))}"
    console.print(
        f"[bold]{settings['model']}[/], batch {settings['batch']}{size}, {settings['dtype']}, "
        f"{environment['cpu']['threads']} threads, "
        f"{environment['cpu']['name'] if environment['device'] == 'cpu' else environment['device']}, "
        f"torch {environment['packages']['torch']}",
        highlight=False,
    )
    checked = result["check"]
    console.print(
        f"numbers checked against float64 (batch {checked['batch']}): {', '.join(checked['reports'])}: all right",
        highlight=False,
    )
    for section in result["sections"]:
        console.print(_variants(section))
        if section["ladder"]:
            console.print(_ladder(section, result["plan"]))
        console.print(_kinds(section))
    console.print(_ceilings(result))
    for note in result["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    for verdict in verdicts(result):
        console.print(verdict)


def _variants(section: dict[str, Any]) -> RenderableType:
    malloc = section["malloc"]
    table = Table(
        title=f"{malloc} malloc: medians \\[quartiles]; speed-up of restructured, paired", title_justify="left"
    )
    table.add_column("variant")
    held = any("held_bytes" in found for found in section["variants"].values())
    for column in ("forward ms", "backward ms", "step ms", "speed-up", "saved MB", "peak MB", *(["held MB"] if held else [])):
        table.add_column(column, justify="right")
    fastest = section["comparison"]["against"]
    for name, found in section["variants"].items():
        ours = name == RESTRUCTURED
        label = f"{name} (fastest rival)" if name == fastest else name
        faster = "" if ours else ratio_text(section["speedups"][name])
        table.add_row(
            label, *(_milliseconds(found[phase]) for phase in ("forward", "backward", "step")), faster,
            *(_megabytes(found.get(figure)) for figure in ("saved_bytes", "peak_bytes", *(["held_bytes"] if held else []))),
            style="bold" if ours else None,
        )  # fmt: skip
    return table


def _ladder(section: dict[str, Any], plan: dict[str, Any]) -> RenderableType:
    table = Table(title=f"ladder, {section['malloc']} malloc", title_justify="left")
    table.add_column("rung")
    for column in ("step ms", "against baseline", "BN sweeps MB", "saved MB", "peak MB"):
        table.add_column(column, justify="right")
    variants = section["variants"]
    baseline = variants[section["ladder"]["baseline"]]["step"]["median"]
    for rung, name in section["ladder"].items():
        found = variants[name]
        table.add_row(
            rung.upper() if rung != "baseline" else rung,
            _milliseconds(found["step"]), f"{baseline / found['step']['median']:.2f}x",
            *map(_megabytes, (rung_bytes(plan, rung), found.get("saved_bytes"), found.get("peak_bytes"))),
        )  # fmt: skip
    return table


def rung_bytes(plan: dict[str, Any], rung: str) -> int:
    """Bytes that batch norms' and activations' own sweeps move in one step on a rung."""
    return plan[rung]["bytes_after"] if rung != "baseline" else plan[RESTRUCTURED]["bytes_before"]


def _kinds(section: dict[str, Any]) -> RenderableType:
    table = Table(
        title=f"profiled time of a step by kind of operation, {section['malloc']} malloc, ms", title_justify="left"
    )
    table.add_column("kind")
    columns = section["kinds"]
    for name in columns:
        for column in (f"{name}: forward", "backward", "share"):
            table.add_column(column, justify="right")
    for kind in KINDS:
        if any(kind in found for found in columns.values()):
            cells = [cell for found in columns.values() for cell in _kind_cells(found, kind)]
            table.add_row(kind, *cells)
    return table


def _kind_cells(found: dict[str, dict[str, float]], kind: str) -> Iterator[str]:
    if kind not in found:
        yield from ("", "", "")
        return
    phases = found[kind]
    yield f"{phases['forward'] * 1e3:.1f}"
    yield f"{phases['backward'] * 1e3:.1f}"
    yield f"{total([phases]) / total(found.values()):.0%}"


def _ceilings(result: dict[str, Any]) -> RenderableType:
    found, dtype = result["ceilings"], result["settings"]["dtype"]
    rate, bandwidth = found[f"{dtype}_flops_per_second"], found["copy_bytes_per_second"]
    plan = result["plan"][RESTRUCTURED]
    multiply = found["step_flops"] / rate
    lines = [
        f"ceilings here: fp32 {found['fp32_flops_per_second'] / 1e9:.0f} GF/s, "
        f"bf16 {found['bf16_flops_per_second'] / 1e9:.0f} GF/s, "
        f"copy {bandwidth / 1e9:.1f} GB/s",
        f"a step's convolutions and matrix products, as direct sums: {found['step_flops'] / 1e9:.1f} GF, "
        f"{multiply * 1e3:.0f} ms at the {dtype} ceiling",
        f"sweeps of {plan['sites']} batch norms "
        f"({plan['fused']} fused, {plan['partial']} partial, {plan['kept']} kept): "
        f"{plan['bytes_before'] / 1e6:.0f} MB ({plan['bytes_before'] / bandwidth * 1e3:.0f} ms) before, "
        f"{plan['bytes_after'] / 1e6:.0f} MB ({plan['bytes_after'] / bandwidth * 1e3:.0f} ms) after",
    ]
    return Group(*(Text(line, style="dim") for line in lines))


def verdicts(result: dict[str, Any]) -> Iterator[Text]:
    """A line for each allocator setting: faster, slower or no different; memory; both sides of every ratio."""
    for section in result["sections"]:
        compared = section["comparison"]
        step = compared["step"]
        ratio = step["ratio"]
        # Only where the paired ratio's quartiles and the two medians agree: few rounds on a busy machine can part them.
        slower = ratio["q3"] < 1 and step["ours"] > step["theirs"]
        faster = ratio["q1"] > 1 and step["ours"] < step["theirs"]
        word = "SLOWER than" if slower else "faster than" if faster else "no different from"
        style = "bold red" if slower else "bold green" if faster else "bold yellow"
        line = (
            f"{section['malloc']} malloc: restructured is {word} {compared['against']}, {ratio_text(ratio)} "
            f"({step['theirs'] * 1e3:.1f} -> {step['ours'] * 1e3:.1f} ms a step)"
        )
        for figure, name in (("saved_bytes", "saved tensors"), ("peak_bytes", "peak memory")):
            if figure in compared:
                sides = compared[figure]
                times = "" if sides["ratio"] is None else f"{sides['ratio']:.2f}x "
                line += f"; {name} {times}({_megabytes(sides['theirs'])} -> {_megabytes(sides['ours'])} MB)"
        yield Text(line, style=style)


def ratio_text(ratio: dict[str, float]) -> str:
    """``1.31x [1.29-1.33]``"""
    return f"{ratio['median']:.2f}x [{ratio['q1']:.2f}-{ratio['q3']:.2f}]"


def _milliseconds(spread: dict[str, float]) -> str:
    digits = 0 if spread["median"] >= 1 else 1
    return "{:.{d}f} [{:.{d}f}-{:.{d}f}]".format(*(spread[k] * 1e3 for k in ("median", "q1", "q3")), d=digits)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f}"
