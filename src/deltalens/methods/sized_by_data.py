"""Modules whose tensors are as long as the data that they were made from."""

from __future__ import annotations

from torch import nn


class SizedByData(nn.Module):
    """A module some of whose tensors begin empty and get their length from training data, a file or a state dict.

    open_length: names of these parameters and buffers; all axes but the first are fixed.
    """

    open_length: tuple[str, ...] = ()

    def make_room(self, leaf: str, length: int) -> None:
        """Let the tensor of that name have so many rows. The object stays, so that an optimiser that has it keeps
        it; rows of another length are gone."""
        tensor = getattr(self, leaf)
        if len(tensor) != length:
            tensor.grad = None
            tensor.data = tensor.data.new_zeros(length, *tensor.shape[1:])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for leaf in self.open_length:
            if prefix + leaf in state_dict:
                self.make_room(leaf, len(state_dict[prefix + leaf]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
