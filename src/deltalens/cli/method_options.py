"""`--method mona --method.bottleneck 32 --method bitfit`: methods with their settings on the command line and in YAML.

A `--method.SETTING VALUE` belongs to the `--method` before it. In YAML a method is a name or a mapping, and several
are a list:

    method: mona
    method: {method: mona, bottleneck: 32}
    method: [{method: mona, bottleneck: 32}, bitfit]
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from deltalens.methods.base import Method

MODEL_HELP = (
    "timm/<name>, hf/<owner>/<repository>, torchvision/<name>, open_clip/<name>/<tag>, deltalens/vit-mini, "
    "deltalens/swin-mini, deltalens/clip-mini, or a model folder"
)
HELP = (
    "method that adapts the backbone; its settings follow as --method.SETTING VALUE; give --method again to combine "
    "several (deltalens list methods shows all)"
)


def add_method_argument(parser: ArgumentParser, default: str = "mona") -> None:
    """Declare --method. The command module also needs `translate = method_options.translate`."""
    parser.add_argument("--method", type=Any, default=default, metavar="NAME", help=HELP)


def translate(argv: list[str]) -> list[str]:
    """Gather `--method` and `--method.SETTING` words into one `--method JSON` word pair. UsageError for a stray
    setting."""
    from deltalens.cli.main import UsageError

    rest, methods, words = [], [], iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--method" and not option.startswith("--method."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{option} needs a value")
        if option == "--method":
            methods.append(_value(value) if value.startswith(("{", "[")) else {"method": value})
        elif not methods or not isinstance(methods[-1], dict):
            raise UsageError(f"{option} must come after the --method it belongs to")
        else:
            methods[-1][option.removeprefix("--method.")] = _value(value)
    return rest + (["--method", json.dumps(methods)] if methods else [])


def read_methods(value: Any) -> list[Method]:
    """Method configurations from what the parser holds. ValueError for unknown names and settings, with the nearest
    ones."""
    from deltalens.methods import make_config

    entries = value if isinstance(value, list) else [value]
    found = []
    for entry in entries:
        if isinstance(entry, list):
            found += read_methods(entry)
        elif isinstance(entry, str):
            found.append(make_config(entry))
        elif isinstance(entry, dict) and isinstance(entry.get("method"), str):
            settings = {key.replace("-", "_"): setting for key, setting in entry.items() if key != "method"}
            found.append(make_config(entry["method"], **settings))
        else:
            raise ValueError(f"a method is a name, or a mapping with a 'method' entry and settings; got {entry!r}")
    if not found:
        raise ValueError("no method given; deltalens list methods shows all")
    return found


def method_entries(methods: list[Method]) -> list[dict[str, Any]]:
    """The methods as YAML-able entries, every setting written out."""
    return [json.loads(json.dumps(method.to_dict())) for method in methods]


def _value(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
