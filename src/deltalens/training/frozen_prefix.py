"""Where training begins in a network: the module below which nothing is trained, so that its input can be kept.

A network is cut at the input of one module: a block, or the head. Everything that runs before it is frozen and free of
randomness, so that for one image the module's input is always the same. `replayed` runs the network from kept inputs:
the image it is given is a single one of NaNs, whose way to the cut costs next to nothing, and at the cut the kept
inputs take its place. What still read the image behind the cut would give NaNs; `find_cut` tries that on real images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import state_of
from deltalens.lifecycle.tensors import anatomy_of
from deltalens.methods.base import Method
from deltalens.sites.output import logits_of


class FeaturesCannotBeKept(ValueError):
    """Something is trained, or random, or reads the image, so that features change from epoch to epoch."""


def find_cut(model: nn.Module, images: Tensor) -> str:
    """Path of the latest block, or head, that runs before anything that is trained.

    images: a few real inputs (B, C, H, W), on the model's device. Raises FeaturesCannotBeKept, which says why, where
    there is no such module behind the first block: something is trained, or random, from the start.
    """
    try:
        calls = _trace(model, images)
    except RuntimeError:
        _refuse_preparing_methods(model)  # they may not run before they are prepared
        raise
    trained = _first_trained(model, calls)
    blocks = [block.path for block in anatomy_of(model).blocks()]
    heads = anatomy_of(model).head_paths()
    candidates = [path for path in [*blocks, *heads] if path in calls and calls[path].fits]
    earlier = [path for path in candidates if calls[path].order <= trained.order]
    cut = max(earlier, key=lambda path: calls[path].order, default=None)
    if cut is None or (blocks and cut == blocks[0]):
        raise FeaturesCannotBeKept(
            f"features cannot be kept: {trained.path or type(model).__name__} is trained, and nothing but the stem "
            "runs before it. Methods that train the head or the last blocks only (linear, mlp, partial) can keep them"
        )
    _refuse_preparing_methods(model)
    _refuse_randomness(model, calls, cut)
    _try(model, cut, images)
    return cut


@contextlib.contextmanager
def recorded(model: nn.Module, cut: str) -> Iterator[list[Tensor]]:
    """A list that gets the input of the module at `cut` at every forward."""
    found: list[Tensor] = []
    handle = model.get_submodule(cut).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def replayed(model: nn.Module, cut: str, image_shape: tuple[int, int, int]) -> Iterator[Any]:
    """A function kept inputs (B, ...) -> the images to give to the model, which then goes on from those inputs."""
    kept: list[Tensor] = []
    handle = model.get_submodule(cut).register_forward_pre_hook(lambda module, args: (kept[-1], *args[1:]))

    def images_for(inputs: Tensor) -> Tensor:
        kept[:] = [inputs]
        return torch.full((1, *image_shape), float("nan"), device=inputs.device, dtype=inputs.dtype)

    try:
        yield images_for
    finally:
        handle.remove()


# ------------------------------------------------------------------ what runs when
class _Call:
    """The first call of a module: its place in the order of calls, and whether it could be a cut."""

    def __init__(self, path: str, order: int, args: tuple, kwargs: dict, batch: int):
        self.path, self.order, self.count = path, order, 1
        others = [*args[1:], *kwargs.values()]
        is_stream = bool(args) and torch.is_tensor(args[0]) and args[0].dim() > 1 and len(args[0]) == batch
        self._alone = is_stream and not any(torch.is_tensor(other) for other in others)

    @property
    def fits(self) -> bool:
        return self._alone and self.count == 1


@torch.no_grad()
def _trace(model: nn.Module, images: Tensor) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    handles, was_training = [], model.training

    def note(path: str, args: tuple, kwargs: dict) -> None:
        if path in calls:
            calls[path].count += 1
        else:
            calls[path] = _Call(path, len(calls), args, kwargs, len(images))

    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
            )
        )
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return calls


def _first_trained(model: nn.Module, calls: dict[str, _Call]) -> _Call:
    """The earliest call of a module that owns trained parameters, or of what such a parameter lies in where its owner
    is never called."""
    found = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = path.rpartition(".")[0]
            while owner not in calls:
                owner = owner.rpartition(".")[0]
            found.append(calls[owner])
    if not found:
        raise ValueError("nothing is trained: the model has no parameter that requires a gradient")
    return min(found, key=lambda call: call.order)


# ------------------------------------------------------------------ what stands against it
def _refuse_preparing_methods(model: nn.Module) -> None:
    state = state_of(model)
    for name in state.active:
        for config in state.adapters[name].configs:
            if type(config).prepare is not Method.prepare:
                raise FeaturesCannotBeKept(
                    f"features cannot be kept: {config.name} takes state from the training images itself"
                )


def _refuse_randomness(model: nn.Module, calls: dict[str, _Call], cut: str) -> None:
    """Modules before the cut that act otherwise in training: dropout and drop path that a method keeps active."""
    was_training = model.training
    model.train()
    active = [
        path
        for path, call in calls.items()
        if call.order < calls[cut].order and (module := model.get_submodule(path)).training
        if not any(True for _ in module.children()) and _is_random(module)
    ]
    model.train(was_training)
    if active:
        raise FeaturesCannotBeKept(
            f"features cannot be kept: {active[0]} ({type(model.get_submodule(active[0])).__name__}) is random in "
            "training; set the backbone's dropout and drop path to 0"
        )


def _is_random(module: nn.Module) -> bool:
    probability = next((getattr(module, name) for name in ("p", "drop_prob", "prob") if hasattr(module, name)), None)
    if probability is not None:
        return float(probability) > 0
    return "drop" in type(module).__name__.lower()


@torch.no_grad()
def _try(model: nn.Module, cut: str, images: Tensor) -> None:
    """Compare the whole network with the replay on real images."""
    was_training = model.training
    try:
        with recorded(model.eval(), cut) as kept:
            expected = logits_of(model(images))
        with replayed(model, cut, tuple(images.shape[1:])) as images_for:
            found = logits_of(model(images_for(kept[0])))
    except RuntimeError as error:
        raise FeaturesCannotBeKept(
            f"features cannot be kept at {cut}: the network reads more than its input there"
        ) from error
    finally:
        model.train(was_training)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise FeaturesCannotBeKept(
            f"features cannot be kept at {cut}: what follows reads the image, or another stream, beside its input there"
        )
