"""Whether a program runs rewritten, told by the first of several processes that train together to the others.

It goes by the store that the processes met by, not by a collective: nobody waits, and a process that meets other programs, or fewer, hears
nothing and keeps its own forward.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import distributed as dist

__all__ = ["heard", "is_heard", "of_several", "tell"]


def is_heard() -> bool:
    """Whether this process is one of several, and not the first one."""
    return of_several() and dist.get_rank() > 0


def tell(program: str, reason: str) -> None:
    """Tell the others why the own forward of ``program`` stays; an empty reason: it does not. One process alone tells nobody."""
    if of_several() and dist.get_rank() == 0:
        with suppress(Exception):  # of whatever store there is: the others say in their plans that they have heard nothing
            _store().set(_key(program), reason)


def heard(program: str) -> str | None:
    """What the first process has told, or None so far. Raises whatever the store does that cannot be asked."""
    store = _store()
    return str(store.get(_key(program)).decode()) if store.check([_key(program)]) else None


def of_several() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(program: str) -> str:
    return f"bnrestructure/{program}"
