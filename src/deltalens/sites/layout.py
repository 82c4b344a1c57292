"""How a tower's stream looks, and how to get at its map.

Spatial modules see channels-last maps (B, H, W, C) only. A layout turns the stream of a block into such a map
and back, whatever the backbone's own format is:

==============  =======================  =========================================================
class           stream                   map
==============  =======================  =========================================================
`Tokens`        (B, prefix + H*W, C)     the last H*W tokens, row by row; everything before is prefix
`ChannelsLast`  (B, H, W, C)             the stream itself
`ChannelsFirst` (B, C, H, W)             the stream, permuted
`Sequence`      (B, N, C)                none: text, point clouds; a spatial module is an error
`Words`         (B, N, C)                none: text, whose ends are known
`Patches`       (B, prefix + G, C)       none: patches of point clouds
`PlainFirst`    (B, C, ...)              none: volumes and the like; a spatial module is an error
==============  =======================  =========================================================
"""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """A stream without prefix tokens. Subclasses say where the map is."""

    prefix = 0
    has_map = True

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stream -> (map (B, H, W, C), prefix tokens or None)."""
        raise TypeError(f"{type(self).__name__} streams have no map")

    def join(self, feature_map: Tensor, prefix: Tensor | None) -> Tensor:
        """The inverse of `split`."""
        raise TypeError(f"{type(self).__name__} streams have no map")

    def features(self, x: Tensor) -> Tensor:
        """Stream -> the same with channels last, for modules that act on each position alone."""
        return x

    def stream(self, features: Tensor) -> Tensor:
        """The inverse of `features`."""
        return features

    def insert(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Put new tokens (1 or B, p, C) right after the backbone's own prefix tokens."""
        raise TypeError(f"{type(self).__name__} streams take no extra tokens")

    def trim(self, x: Tensor) -> Tensor:
        """Drop every token that is neither one of the backbone's prefix tokens nor part of the map."""
        return x

    def added(self, x: Tensor) -> int:
        """How many tokens of the stream adapters have added, right after the prefix."""
        return 0


class ChannelsLast(Layout):
    """(B, H, W, C), as in Swin."""

    def split(self, x):
        return x, None

    def join(self, feature_map, prefix):
        return feature_map


class ChannelsFirst(Layout):
    """(B, C, H, W), as in convolutional networks."""

    def split(self, x):
        return x.permute(0, 2, 3, 1), None

    def join(self, feature_map, prefix):
        return feature_map.permute(0, 3, 1, 2)

    def features(self, x):
        return x.permute(0, 2, 3, 1)

    def stream(self, features):
        return features.permute(0, 3, 1, 2)


def _insert_after(x: Tensor, tokens: Tensor, prefix: int) -> Tensor:
    tokens = tokens.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :prefix], tokens, x[:, prefix:]], 1)


class Sequence(Layout):
    """(B, N, C) tokens with no map behind them: text, or an image tower whose grid nobody knows. `reason` says why
    there is none; streams with more axes, channels last, are read alike."""

    has_map = False

    def __init__(self, prefix: int = 0, reason: str = ""):
        self.prefix = prefix
        self.reason = reason

    def why_no_map(self) -> str:
        """For the end of an error message; empty for streams that nobody would take for a map."""
        if not self.reason:
            return ""
        return f" ({self.reason}; blocks=, a regular expression of block paths, chooses blocks that have one)"

    def split(self, x):
        raise TypeError(
            "this stream is a plain sequence (text, points, or tokens of an unknown grid): a method with spatial "
            "modules (Mona, Convpass) has no map to work on; use LoRA, Adapter, AdaptFormer or VPT here"
            + self.why_no_map()
        )

    def insert(self, x, tokens):
        return _insert_after(x, tokens, self.prefix)


class Words(Sequence):
    """(n, L, C) embedded texts. `ends` (n,): the position in each text that its features are read from, recorded when a
    pass begins, as a token grid is; None outside a classifier that is made of texts."""

    def __init__(self):
        super().__init__()
        self.ends: Tensor | None = None

    def insert(self, x, tokens):
        raise TypeError("texts take no extra tokens in front: mask and pooling count words from there")


class Patches(Sequence):
    """(B, prefix + G, C): class tokens, then G patches of a point cloud, which lie in no grid. What adapters add
    stands between them. The owner of the tokens records G (`record`).

    found: what a pass knows about its clouds while it is under way, by name, for modules in its blocks: "centres"
    (B, G, 3) of the patches, and what modules at its beginning have found. Empty between passes.
    """

    def __init__(self, prefix: int, count: int):
        super().__init__(prefix)
        self.count = count
        self.found: dict[str, Tensor] = {}

    def of_pass(self, name: str) -> Tensor:
        """What the pass under way has found. RuntimeError outside of one."""
        if name not in self.found:
            raise RuntimeError(
                f"the {name} of this pass are not known: give clouds to the model's own forward or forward_features, "
                "with all parts of the adapter active"
            )
        return self.found[name]

    def why_no_map(self) -> str:
        return ": patches of a point cloud lie in no grid"

    def record(self, count: int) -> None:
        """Called by the owner with the number of patches of the current input."""
        self.count = count

    def added(self, x):
        return x.shape[1] - self.count - self.prefix

    def trim(self, x):
        if self.added(x) <= 0:
            return x
        return torch.cat([x[:, : self.prefix], x[:, x.shape[1] - self.count :]], 1)


class PlainFirst(Sequence):
    """(B, C, ...) with no map behind it, such as the volumes of a 3-D network."""

    def __init__(self, reason: str = ""):
        super().__init__(0, reason)

    def features(self, x):
        return x.movedim(1, -1)

    def stream(self, features):
        return features.movedim(-1, 1)

    def insert(self, x, tokens):
        raise TypeError(f"{type(self).__name__} streams take no extra tokens")


class Tokens(Layout):
    """(B, prefix + H*W, C) with a map behind it, as in a ViT.

    The grid of the current input is recorded by the tower's patch embedding (`record`); it is the only thing that
    outlives a call. Under activation checkpointing a block runs once more during backward, when a later forward may
    have recorded another grid: there the grid is looked up by the number of tokens it was first used with. (Two
    checkpointed inputs of equal token count and different shape, such as 8x4 and 4x8, before one backward would be
    confused; call backward between them.)
    """

    def __init__(self, prefix: int, grid: tuple[int, int] | None = None):
        self.prefix = prefix
        self.grid = grid
        self._grid_of_length: dict[int, tuple[int, int]] = {}

    def record(self, height: int, width: int) -> None:
        """Called by the patch embedding with the grid of the current input."""
        self.grid = (height, width)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        grid = self.grid
        if torch.compiler.is_compiling():
            pass
        elif torch._C._current_graph_task_id() != -1:  # inside backward: a checkpoint runs this block again
            grid = self._grid_of_length.get(x.shape[1], grid)
        elif torch.is_grad_enabled() and grid is not None:
            self._grid_of_length[x.shape[1]] = grid
        if grid is None:
            raise RuntimeError(
                "the token grid is unknown: the patch embedding of this tower has not run. Feed images through the "
                "model's own forward, or use a method without spatial modules"
            )
        if x.shape[1] < grid[0] * grid[1]:
            raise RuntimeError(
                f"{x.shape[1]} tokens cannot hold a {grid[0]}x{grid[1]} map: patch dropout or token pruning removes "
                "tokens, which methods with spatial modules cannot work with; set patch_drop_rate=0"
            )
        return grid

    def split(self, x):
        height, width = self._grid_of(x)
        start = x.shape[1] - height * width
        return x[:, start:].unflatten(1, (height, width)), (x[:, :start] if start else None)

    def join(self, feature_map, prefix):
        tokens = feature_map.flatten(1, 2)
        return tokens if prefix is None else torch.cat([prefix, tokens], 1)

    def insert(self, x, tokens):
        return _insert_after(x, tokens, self.prefix)

    def added(self, x):
        height, width = self._grid_of(x)
        return x.shape[1] - height * width - self.prefix

    def trim(self, x):
        if self.grid is None:
            return x
        height, width = self._grid_of(x)
        start = x.shape[1] - height * width
        if start <= self.prefix:
            return x
        return torch.cat([x[:, : self.prefix], x[:, start:]], 1)
