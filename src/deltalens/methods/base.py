"""What a method is: a frozen dataclass that says where its modules go and which tensors it unfreezes."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from deltalens.methods.wrapping import Wrapping
from deltalens.sites.anatomy import Anatomy, Site

Placement = tuple[Site, str, nn.Module]
M = TypeVar("M", bound="Method")


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all method configurations.

    A subclass is a frozen dataclass named `<Method>Config`; its fields are the method's settings with the paper's or
    the official code's defaults. It overrides `place`, `unfreeze`, or both.

    name: the registry name, set by `register`.
    frozen_mode: "eval" holds frozen modules in eval mode during training (no dropout, no drop-path); "train" leaves
        them active, for methods whose paper did. Frozen BatchNorm is in eval mode either way.
    head_only: True for methods that touch nothing of the backbone on purpose; for all others that is an error.
    learning_rate: a good peak rate for AdamW at batch size 64, where the user names none. SGD wants about a hundred
        times as much.
    """

    name: ClassVar[str]
    frozen_mode: ClassVar[Literal["eval", "train"]] = "eval"
    head_only: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        """Yield (site, slot, module). One module object may be yielded for several sites: it is then shared."""
        yield from ()

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        """Paths of backbone parameters to train."""
        return ()

    def head(self, layer: nn.Module) -> nn.Module:
        """What takes the place of the classifier layer, which is trained from a copy of its own. A module with
        `in_features` and `out_features`."""
        return layer

    def wrap(self, anatomy: Anatomy) -> Wrapping | None:
        """Layers that the method replaces with wrappers of its own, as libraries do that rename what they adapt. It
        builds them and leaves the model as it is; the lifecycle puts them in place. A method of your own does not
        need this: `place` keeps names and classes."""
        return None

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        """Further loss terms of the method, by name; a task adds them to its own loss. What modules have noted in the
        forward (`deltalens.methods.notes`) is at hand."""
        return {}

    def combine(self, gradients: dict[str, list[Tensor]]) -> list[Tensor]:
        """A gradient rule: what the optimiser gets instead of the gradient of the sum of all loss terms.

        gradients: loss term -> its gradient for each trained parameter. The task's own terms go by their names
        ("cross_entropy"), those of `losses` by "<method>.<term>". All may be multiplied with one factor (loss scaling):
        a rule gives c times its result for c times the gradients. `deltalens.tasks.backward` runs one backward for each
        term where a method overrides this, and a plain one elsewhere.
        """
        return [torch.stack(each).sum(0) for each in zip(*gradients.values(), strict=True)]

    def prepare(self, model: nn.Module, loader: Iterable) -> None:
        """Compute state from training data once, before training (caches, prototypes, choices), into buffers or
        parameters of the method's modules. `deltalens.prepare` calls it; what is already there stays as it is."""

    def finish(self, model: nn.Module, loader: Iterable) -> dict[str, Any]:
        """Choose settings on validation images once, after training and before any test (Tip-Adapter's alpha and beta).

        The method gives them to its modules and returns them by name; the adapter's configuration, and so its files,
        then have them. Empty where nothing was chosen. `deltalens.finish` calls it.
        """
        return {}

    def remarks(self, model: nn.Module, loader: Iterable) -> list[str]:
        """What a user should be told when training is over, such as experts that nobody uses. loader: training batches,
        of which it takes a few. `deltalens.training.fit` gives each as a warning."""
        return []

    def unfreeze_multiplier(self) -> float:
        """Factor on the learning rate of the tensors that `unfreeze` names."""
        return 1.0

    def lr_multipliers(self) -> dict[str, float]:
        """Substring of a parameter's path -> factor on the learning rate."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings, with the method's name."""
        return {"method": self.name, **dataclasses.asdict(self)}


def setting(*, default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field with one line of help, and the values it may have where these are few."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(config: Method) -> None:
    """Raise ValueError for a field that is not one of its choices."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value not in choices:
            raise ValueError(f"{type(config).__name__}.{field.name} must be one of {choices}, got {value!r}")


_FETCHING = contextvars.ContextVar("deltalens_fetching", default=True)


@contextlib.contextmanager
def without_fetching() -> Iterator[None]:
    """Within the context `may_fetch` is false: all tensors of what methods build come from a file afterwards."""
    token = _FETCHING.set(False)
    try:
        yield
    finally:
        _FETCHING.reset(token)


def may_fetch() -> bool:
    """Whether a method that builds on pretrained weights of its own (Sidetune) should fetch them now."""
    return _FETCHING.get()


_METHODS: dict[str, type[Method]] = {}
_LATER: dict[str, Callable[[str], type[Method]]] = {}


@dataclass_transform(frozen_default=True, field_specifiers=(setting,))
def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a configuration known as `name` and turn it into a frozen dataclass."""

    def decorate(cls: type[M]) -> type[M]:
        cls = dataclasses.dataclass(frozen=True)(cls)
        cls.name = name
        if name in _METHODS and _METHODS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"the method name {name!r} is already taken by {_METHODS[name].__qualname__}")
        _METHODS[name] = cls
        return cls

    return decorate


def register_later(names: Iterable[str], build: Callable[[str], type[Method]]) -> None:
    """Make names known whose configuration class is built when it is first asked for: it needs a heavy library."""
    _LATER.update(dict.fromkeys(names, build))


def list_methods(pattern: str = "*") -> list[str]:
    """Names of all methods that match a shell pattern, such as "vpt*"."""
    return sorted(fnmatch.filter({*_METHODS, *_LATER}, pattern))


def method_class(name: str) -> type[Method]:
    """The configuration class of a method; ValueError with the nearest names for an unknown one."""
    if name in _METHODS:
        return _METHODS[name]
    if name in _LATER:
        return _LATER[name](name)
    near = difflib.get_close_matches(name, list_methods(), n=3) or list_methods()
    raise ValueError(f"unknown method {name!r}; did you mean {' or '.join(near)}? All: {', '.join(list_methods())}")


def make_config(name: str, **settings: Any) -> Method:
    """Build a configuration by name. Unknown settings raise ValueError with the nearest names."""
    cls = method_class(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{name} has no setting {key!r}{hint} It has: {', '.join(known) or 'none'}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return cls(**values)
