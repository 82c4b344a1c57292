"""What was found in the tiles of large pictures, as results of the pictures: what was found twice left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from deltalens.data.tiling import Tile
from deltalens.models.oriented_nms import batched_oriented_nms

Found = dict[str, Tensor]
THRESHOLD = 0.1  # of the overlap, as in DOTA's development kit


def merged(results: Iterable[tuple[str, Found]], threshold: float = THRESHOLD) -> dict[str, Found]:
    """source picture -> what was found in all of its tiles, in its pixels, best first.

    results: of every tile its name (see `Tile.named`), and boxes (n, 5) in the tile's pixels, labels (n,) and scores
    (n,). Of two boxes of a class whose IoU is above `threshold` the one with the higher score stays. A name that is not
    that of a tile stands for a whole picture. Pictures come in the order in which their first tiles do.
    """
    tiles: dict[str, list[Found]] = defaultdict(list)
    for name, found in results:
        tile = Tile.named(name) or Tile(name, 0, 0)
        tiles[tile.source].append(found | {"boxes": tile.in_source(found["boxes"])})
    return {source: _without_doubles(parts, threshold) for source, parts in tiles.items()}


def _without_doubles(parts: list[Found], threshold: float) -> Found:
    together = {name: torch.cat([part[name] for part in parts]) for name in ("boxes", "labels", "scores")}
    kept = batched_oriented_nms(together["boxes"], together["scores"], together["labels"], threshold)
    return {name: values[kept] for name, values in together.items()}
