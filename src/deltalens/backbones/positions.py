"""Which position of the image an element of a tensor belongs to, followed through a forward of fake tensors.

The result of a convolution, pooling or resizing of images (B, C, H, W) is a map: the element [b, c, h, w] stands at
position h * W + w. From there the positions are followed through every operation: what only moves data (reshape,
transpose, cat, slices) moves them too, what acts on each element or each channel vector alone (sums, norms, linear
layers) keeps them, a residual sum with something unknown keeps those of the other operand; a linear layer on gathered
patches makes a new map. After any other operation they are unknown. A stream whose positions come out as 0, 1, 2, ...
is therefore proven to be a map in row order, whatever its numbers are; that a token count happens to be H * W proves
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BATCH = 2  # images of the trial forward
_MERGED = (2, 3, 4)  # sides of the patches that linear layers may merge

_NEW_MAPS = {
    aten.convolution, aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d,
    aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d, aten.adaptive_max_pool2d,
}  # fmt: skip
_MOVES = {
    aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.clone, aten.slice,
    aten.unsqueeze, aten.squeeze, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.roll, aten.flip,
    aten.alias, aten.detach, aten.cat, aten.stack, aten.constant_pad_nd, aten.repeat, aten.pixel_shuffle,
    aten.pixel_unshuffle, aten.channel_shuffle, aten._reshape_alias, aten.select,
}  # fmt: skip
_KEEPS = {
    aten.native_layer_norm, aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.native_group_norm,
    aten._native_batch_norm_legit, aten._batch_norm_no_update, aten._fused_rms_norm, aten.native_dropout, aten._to_copy,
    aten._softmax, aten.cumsum, aten.div, aten.glu,
}  # fmt: skip


class Positions(NamedTuple):
    """ids: the position of every element, -1 where it belongs to none. grid: (H, W) of the map they count in.
    origins: numbers of the maps they come from."""

    ids: Tensor
    grid: tuple[int, int]
    origins: frozenset[int]


class Follow(TorchDispatchMode):
    """Within this mode every tensor knows its positions, in its attribute `_positions`."""

    def __init__(self):
        super().__init__()
        self.maps = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function.overloadpacket
        try:
            with no_dispatch():
                found = self._result(function, packet, args, kwargs, result)
        except (RuntimeError, TypeError, ValueError, IndexError):
            found = None  # no proof
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(found, list) and isinstance(result, (tuple, list)):
            for tensor, positions in zip(result, found, strict=True):
                tensor._positions = positions
        elif isinstance(first, Tensor):
            first._positions = found if isinstance(found, Positions) else None
        if function._schema.is_mutable and isinstance(args[0] if args else None, Tensor) and args[0]._base is not None:
            args[0]._base._positions = None  # part of it has changed
        return result

    def _result(self, function, packet, args, kwargs, result) -> Positions | list[Positions | None] | None:
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(first, Tensor):
            return None
        if packet in _NEW_MAPS:
            return self._new_map(first)
        if packet in _MOVES:
            return _moved(function, args, kwargs, result)
        if packet in _KEEPS:
            known = positions_of(args[0])
            return known if known is not None and known.ids.shape == first.shape else None
        if packet in (aten.mm, aten.linear, aten.addmm):
            x = args[1] if packet is aten.addmm else args[0]
            return _projected(x, first) or self._merged(x, first)
        if packet is aten.copy_:
            return _together([positions_of(args[1])], first)
        if torch.Tag.pointwise in function.tags:
            operands = [each for arg in args for each in (arg if isinstance(arg, (tuple, list)) else [arg])]
            return _together([positions_of(each) for each in operands], first)
        return None

    def _new_map(self, result: Tensor) -> Positions | None:
        if result.dim() != 4 or result.shape[0] != BATCH:
            return None
        height, width = result.shape[2:]
        self.maps += 1
        ids = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width).expand(result.shape)
        return Positions(ids, (height, width), frozenset([self.maps]))

    def _merged(self, x: Tensor, result: Tensor) -> Positions | None:
        """A linear layer on vectors that gather the positions of one patch each, patch by patch in row order, is a
        convolution with that stride, as in Swin's patch merging: a new map."""
        known = positions_of(x)
        if known is None or known.ids[..., 0].numel() % BATCH:
            return None
        (height, width), ids = known.grid, known.ids.reshape(-1, known.ids.shape[-1])
        ids = ids[: len(ids) // BATCH]
        order = torch.arange(len(ids), dtype=torch.int32)
        for step in _MERGED:
            rows, columns = -(-height // step), -(-width // step)
            patch = ids // width // step * columns + ids % width // step
            fits = rows * columns == len(ids) and bool((ids >= 0).any(1).all())
            if fits and bool(((patch == order[:, None]) | (ids < 0)).all()):
                self.maps += 1
                new = order.repeat(BATCH).view(*result.shape[:-1], 1).expand(result.shape)
                return Positions(new, (rows, columns), frozenset([self.maps]))
        return None


def positions_of(tensor: object) -> Positions | None:
    return getattr(tensor, "_positions", None)


def _moved(function, args, kwargs, result) -> Positions | list[Positions | None] | None:
    known: list[Positions] = []

    def ids(arg):
        if isinstance(arg, (tuple, list)) and any(isinstance(each, Tensor) for each in arg):
            return [ids(each) for each in arg]
        if not isinstance(arg, Tensor):
            return arg
        positions = positions_of(arg)
        if positions is None:
            return torch.full((1,) * arg.dim(), -1, dtype=torch.int32).expand(arg.shape)
        known.append(positions)
        return positions.ids

    found = [ids(arg) for arg in args]
    if not known or len({positions.grid for positions in known}) > 1:
        return None
    if function.overloadpacket is aten.constant_pad_nd:
        found[2:] = [-1]
    if function.overloadpacket in (aten.view, aten._unsafe_view, aten._reshape_alias):
        moved = _reshaped(found[0], result.shape)
    elif function.overloadpacket in (aten.clone, aten.alias, aten.detach):
        moved = found[0]
    else:
        moved = function(*found, **kwargs)
    origins = frozenset.union(*[positions.origins for positions in known])
    if isinstance(result, (tuple, list)):
        return [_with_any(Positions(each, known[0].grid, origins)) for each in moved]
    return _with_any(Positions(_slim(moved), known[0].grid, origins))


def _with_any(positions: Positions) -> Positions | None:
    """None for what has been cut off a map: a class token."""
    return positions if bool((_once(positions.ids) >= 0).any()) else None


def _reshaped(ids: Tensor, shape: torch.Size) -> Tensor:
    if ids.dim() and ids.stride(-1) == 0 and len(shape) and ids.shape[-1] == shape[-1]:
        return ids[..., :1].reshape(*shape[:-1], 1).expand(shape)
    return ids.reshape(shape)


def _slim(ids: Tensor) -> Tensor:
    """The same without memory for channels that are all of one position."""
    if ids.dim() == 3 and ids.stride(-1) and bool((ids == ids[..., :1]).all()):
        return ids[..., :1].clone().expand(ids.shape)
    return ids


def _once(ids: Tensor) -> Tensor:
    """The same with one entry on every axis along which nothing changes and no memory is held."""
    for axis in range(ids.dim()):
        if ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids


def _projected(x: Tensor, result: Tensor) -> Positions | None:
    """A linear layer keeps the position of a vector of channels if that is all of one position."""
    known = positions_of(x)
    if known is None or not bool((_once(known.ids) == _once(known.ids[..., :1])).all()):
        return None
    return known._replace(ids=known.ids[..., :1].expand(result.shape))


def _together(operands: list[Positions | None], result: Tensor) -> Positions | None:
    """Element by element: operands that are spread out, such as the gates of a channel attention, say nothing."""
    known = [each for each in operands if each is not None]
    whole = [each for each in known if each.ids.shape == result.shape]
    if not whole:
        if len(known) != 1:
            return None
        return known[0]._replace(ids=known[0].ids.expand(result.shape))
    found = whole[0]
    for other in whole[1:]:
        if other.grid != found.grid:
            return None
        ids = found.ids
        if other.ids is not ids:
            mine, theirs = _once(ids), _once(other.ids)
            if bool(((mine >= 0) & (theirs >= 0) & (mine != theirs)).any()):
                return None
            ids = torch.where(mine < 0, theirs, mine).expand(ids.shape) if bool((mine < 0).any()) else ids
        found = Positions(ids, found.grid, found.origins | other.origins)
    return found


# ------------------------------------------------------------------ what positions prove
def map_axes(tensor: Tensor) -> tuple[str, tuple[int, int], int, frozenset[int]] | None:
    """(format, grid, prefix tokens, origins) of a tensor that is proven to be a map in row order, None of any other.

    Formats: "first" (B, C, H, W), "last" (B, H, W, C), "tokens" (B, prefix + H * W, C).
    """
    known = positions_of(tensor)
    if known is None or tensor.shape[0] != BATCH:
        return None
    ids, shape, (height, width) = _once(known.ids), tensor.shape, known.grid
    order = torch.arange(height * width, dtype=torch.int32)
    if len(shape) == 4 and shape[2:] == known.grid and bool((ids == order.view(1, 1, height, width)).all()):
        return "first", known.grid, 0, known.origins
    if len(shape) == 4 and shape[1:3] == known.grid and bool((ids == order.view(1, height, width, 1)).all()):
        return "last", known.grid, 0, known.origins
    prefix = shape[1] - height * width if len(shape) == 3 else -1
    if prefix >= 0:
        expected = torch.cat([torch.full((prefix,), -1, dtype=torch.int32), order])
        if bool((ids == expected.view(1, -1, 1)).all()):
            return "tokens", known.grid, prefix, known.origins
    return None
