"""List methods with their settings, models, or recipes; a pattern such as "vit_base*" narrows it.

Models are those of timm, torchvision and open_clip; "torchvision/*" lists one library. The Hugging Face Hub is not
listed.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("what", type=Literal["methods", "models", "recipes"], help="what to list")
    parser.add_argument("pattern", type=str, nargs="?", default="*", help="shell pattern of the names")
    parser.add_argument("--pretrained", type=bool, default=True, help="models: only those with pretrained weights")


def run(args: Namespace) -> None:
    """Print the list."""
    lines = {"methods": _methods, "models": _models, "recipes": _recipes}[args.what](args)
    if not lines:
        raise ValueError(f"no {args.what} match {args.pattern!r}; deltalens list {args.what} shows all")
    print("\n".join(lines))


def _methods(args: Namespace) -> list[str]:
    import dataclasses

    from deltalens.methods import list_methods, method_class

    lines = []
    for name in list_methods(args.pattern):
        if name.startswith("peft/") and args.pattern == "*":
            continue  # their settings are peft's, and many
        cls = method_class(name)
        lines.append(f"{name:<12} {(cls.__doc__ or '').strip().partition(chr(10))[0]}")
        for field in dataclasses.fields(cls):
            setting = f"--method.{field.name} {_shown(field)}"
            lines.append(f"         {setting:<36} {field.metadata.get('help', '')}")
    if args.pattern == "*":
        tuners = ", ".join(list_methods("peft/*"))
        lines += textwrap.wrap(f"of the peft library: {tuners}", 110, subsequent_indent=" " * 9, break_on_hyphens=False)
        lines.append("         deltalens list methods 'peft/loha' shows the settings of one")
    return lines


def _shown(field) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    return str(list(value)).replace("'", "") if isinstance(value, tuple) else str(value)


def _models(args: Namespace) -> list[str]:
    import deltalens as dl

    return dl.list_models(args.pattern, pretrained=args.pretrained)


def _recipes(args: Namespace) -> list[str]:
    import fnmatch

    from deltalens.cli.recipes import listing, recipe_files

    return listing([name for name in recipe_files() if fnmatch.fnmatch(name, args.pattern)])
