"""The structures of src/arguments.h, which says what each field means; :func:`layout` is what both sides must agree on.

A field that is not given is zero: a null pointer, "not there".
"""

from __future__ import annotations

import ctypes

__all__ = ["BackwardArguments", "FinalizeArguments", "ForwardArguments", "JoinArguments", "SweepArguments", "layout"]


_INTEGER, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


def _of(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Problem(ctypes.Structure):
    """A convolution: what ``ForwardArguments`` and ``BackwardArguments`` begin with."""

    _fields_ = (
        *_of(_INTEGER, "batch in_channels in_height in_width out_channels out_height out_width kernel_h kernel_w stride_h stride_w"),
        *_of(_INTEGER, "padding_h padding_w dilation_h dilation_w groups x_element y_element weight_element threads activation"),
        ("slope", _REAL),
        ("weight_strides", _INTEGER * 4),
        ("x_pitch", _INTEGER),
        *_of(_POINTER, "x weight mean scale beta gate"),
    )


class JoinArguments(ctypes.Structure):
    """A residual join."""

    _fields_ = (
        ("y", _POINTER), ("y_pitch", _INTEGER), *_of(_POINTER, "y_mean y_scale y_beta gate"),
        *_of(_INTEGER, "gate_pitch image_pixels"),
        ("r", _POINTER), ("r_pitch", _INTEGER), *_of(_POINTER, "r_mean r_scale r_beta"),
        ("activation", _INTEGER), ("slope", _REAL),
    )  # fmt: skip


class ForwardArguments(_Problem):
    """A convolution's forward pass."""

    _fields_ = (
        ("bias", _POINTER), ("y", _POINTER), ("y_pitch", _INTEGER), ("y_mean", _POINTER), ("y_var", _POINTER), ("join", JoinArguments),
    )  # fmt: skip


class BackwardArguments(_Problem):
    """A convolution's backward pass."""

    _fields_ = (
        ("dy", _POINTER), ("dy_pitch", _INTEGER), *_of(_POINTER, "s a b"), ("y", _POINTER), ("y_pitch", _INTEGER), ("y_mean", _POINTER),
        ("dx", _POINTER), ("dx_pitch", _INTEGER), ("accumulate", _INTEGER), *_of(_POINTER, "sum_p sum_px sum_pr gate_gradient"),
        ("weight_gradient", _POINTER), ("weight_gradient_strides", _INTEGER * 4), ("bias_gradient", _POINTER), ("gradient_factor", _REAL),
        ("join", JoinArguments),
    )  # fmt: skip


class SweepArguments(ctypes.Structure):
    """A sweep."""

    _fields_ = (
        *_of(_INTEGER, "element images height width channels threads activation"), ("slope", _REAL),
        ("x", _POINTER), ("x_pitch", _INTEGER), *_of(_POINTER, "mean scale beta gate"),
        ("r", _POINTER), ("r_pitch", _INTEGER), *_of(_POINTER, "r_mean r_scale r_beta"),
        ("z", _POINTER), ("z_pitch", _INTEGER), *_of(_POINTER, "z_mean z_var pooled"),
        ("dz", _POINTER), ("dz_pitch", _INTEGER), ("gradient_factor", _REAL), *_of(_POINTER, "s a b"),
        ("dx", _POINTER), ("dx_pitch", _INTEGER), ("accumulate", _INTEGER), *_of(_POINTER, "sum_p sum_px sum_pr gate_gradient"),
        *_of(_INTEGER, "kernel_h kernel_w stride_h stride_w padding_h padding_w out_height out_width"),
        ("index", _POINTER), ("index_pitch", _INTEGER),
    )  # fmt: skip


class FinalizeArguments(ctypes.Structure):
    """The step between the halves of a batch norm."""

    _fields_ = (
        ("channels", _INTEGER), *_of(_POINTER, "mean var"), *_of(_REAL, "unbias momentum eps"), *_of(_POINTER, "weight bias"),
        *_of(_INTEGER, "weight_element bias_element"), *_of(_POINTER, "running_mean running_var"),
        *_of(_INTEGER, "running_mean_element running_var_element"),
        *_of(_POINTER, "rstd scale beta dscale dbeta of_mean of_var dmean dvar dweight"),
    )  # fmt: skip


def layout() -> str:
    """What ``bnr_layout()`` of a library says if it was made for these structures: their fields, with offset and size in bytes."""
    problem = ctypes.sizeof(_Problem)
    lines = [_described("Problem", _Problem, ""), _described("Join", JoinArguments, "")]
    for structure in (ForwardArguments, BackwardArguments):
        lines.append(_described(structure.__name__, structure, f" problem 0 {problem},"))
    lines += [_described(structure.__name__, structure, "") for structure in (SweepArguments, FinalizeArguments)]
    return "".join(lines)


def _described(name: str, structure: type[ctypes.Structure], base: str) -> str:
    fields = ((field[0], getattr(structure, field[0])) for field in structure._fields_)
    return f"{name} {ctypes.sizeof(structure)}:{base}" + "".join(f" {of} {f.offset} {f.size}," for of, f in fields) + "\n"
