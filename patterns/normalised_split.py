"""split-of-(conv-bn-act): a normalised tensor that is split along channels, so that the readers of each part could normalise it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.ir import Normalise
from bnrestructure.graph.operations import add_of, concat_of, pooling_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.splits import Split, part_of, split_of
from bnrestructure.patterns.pairs import can_normalise, is_conv, normalise_making

__all__ = ["NormalisedSplit", "normalised_split"]


@dataclass(frozen=True)
class NormalisedSplit:
    """A split along channels of what ``normalise`` makes; ``parts`` are the nodes of its parts, with the number of each."""

    split: Split
    normalise: Normalise
    parts: list[tuple[fx.Node, int]]


def normalised_split(node: fx.Node) -> NormalisedSplit | None:
    """YOLO's C2f, CSPNet's stages and Res2Net's: only splits read the normalised tensor, and at least one part need not be made.

    The readers of such a part are convolutions, pools, concats and sums: some normalise what they read, for others the part is written
    once, where a concat or a sum wants it.
    """
    split = split_of(node)
    normalise = None if split is None else normalise_making(split.input)
    if split is None or normalise is None or split.dim != 1 or any(split_of(reader) is None for reader in split.input.users):
        return None
    found = [(user, part[1]) for user in node.users if (part := part_of(user)) is not None]
    if len(found) < len(node.users) or any(provenance(part).changed_by is not None for part, _ in found):
        return None
    wanted = any(part.users and all(_takes(reader, part, normalise) for reader in part.users) for part, _ in found)
    return NormalisedSplit(split, normalise, found) if wanted else None


def _takes(reader: fx.Node, part: fx.Node, normalise: Normalise) -> bool:
    pooling = pooling_of(reader)
    pools = pooling is not None and pooling.input is part and can_normalise(normalise, pooling)
    return pools or is_conv(reader) or concat_of(reader) is not None or add_of(reader) is not None
