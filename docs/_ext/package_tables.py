"""Tables that the pages take from the package itself, so that they cannot fall behind it.

    ```{method-settings} mona         the fields of MonaConfig
    ```{command-options} train        the options of `deltalens train`
    ```{learning-rates}               the default learning rate of each method
    ```{installed-recipes}            the recipes with their text

It also lets docstrings be plain text, with indented formulas.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive


def _inline(text: str) -> list[nodes.Node]:
    """Text in which `words` between backticks are code."""
    return [nodes.literal(part, part) if i % 2 else nodes.Text(part) for i, part in enumerate(text.split("`"))]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    """A table whose cells are text with `code` in backticks."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *[_row(row) for row in rows])
    return nodes.table("", group, classes=["colwidths-auto", "package"])


def _row(cells: tuple[str, ...]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", *_inline(cell))) for cell in cells])


class MethodSettings(Directive):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from deltalens.methods import method_class

        rows = []
        for field in dataclasses.fields(method_class(self.arguments[0])):
            choices = field.metadata.get("choices")
            meaning = field.metadata.get("help", "")
            if choices:
                meaning += f" ({', '.join(f'`{choice!r}`' for choice in choices)})"
            rows.append((f"`{field.name}`", f"`{field.default!r}`", meaning))
        if not rows:
            return [nodes.paragraph("", "This method has no settings.")]
        return [table(("setting", "default", "meaning"), rows)]


class LearningRates(Directive):
    def run(self) -> list[nodes.Node]:
        from deltalens.methods import list_methods, method_class

        return [
            table(
                ("method", "learning rate"),
                [
                    (name, f"{method_class(name).learning_rate:g}")
                    for name in list_methods()
                    if not name.startswith("peft/")
                ],
            )
        ]


class CommandOptions(Directive):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = []
        for action in command_parser(self.arguments[0])._actions:
            names = [name for name in action.option_strings if name.startswith("--")] or [action.dest]
            if names[0] in self.common:
                continue
            flag = action.nargs == 0
            default = "required" if action.required else "" if flag else _default(action.default)
            rows.append((f"`{names[0]}`", default, f"{action.help or ''}{_values(action)}"))
        return [table(("option", "default", "meaning"), rows)]

    common: ClassVar = ("--help", "--print_config", "--config")


def command_parser(command: str):
    """The parser of a command, as the command line builds it."""
    from jsonargparse import ArgumentParser

    from deltalens.cli.main import COMMANDS

    parser = ArgumentParser(prog=f"deltalens {command}", exit_on_error=False)
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def _default(value) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(action) -> str:
    """The values that an option may take, where they are few."""
    from typing import Literal, get_args, get_origin

    hint = getattr(action, "_typehint", None)
    values = get_args(hint) if get_origin(hint) is Literal else ("true", "false") if hint is bool else action.choices
    return f" ({', '.join(f'`{value}`' for value in values)})" if values else ""


class InstalledRecipes(Directive):
    def run(self) -> list[nodes.Node]:
        from deltalens.cli.recipes import recipe_files

        found: list[nodes.Node] = []
        for name, file in recipe_files().items():
            text = file.read_text(encoding="utf-8").rstrip()
            found += [nodes.rubric(name, name), nodes.literal_block(text, text, language="yaml")]
        return found


# ------------------------------------------------------------------ docstrings
def plain_text_as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented blocks become literal blocks, hanging indents part of their paragraph; in place."""
    result: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        after_text = bool(result) and bool(result[-1].strip())
        if indented and not literal:
            if after_text:
                line = line.strip()
            else:
                result += ["::", ""]
                literal = True
        elif line.strip() and not indented:
            literal = False
        result.append(line)
    lines[:] = result


def setup(app):
    app.add_directive("method-settings", MethodSettings)
    app.add_directive("learning-rates", LearningRates)
    app.add_directive("command-options", CommandOptions)
    app.add_directive("installed-recipes", InstalledRecipes)
    app.connect("autodoc-process-docstring", plain_text_as_rst)
    return {"parallel_read_safe": True}
