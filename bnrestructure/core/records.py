"""Small records that are made for every kernel call: dataclasses with slots, frozen to the type checker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

__all__ = ["record"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A dataclass with slots that nobody may write to: mypy says so.

    ``dataclass(frozen=True)`` would say so at run time, too, and make a record of nine fields cost 3 us in place of 0.5.
    """
    return dataclass(slots=True)(cls)
