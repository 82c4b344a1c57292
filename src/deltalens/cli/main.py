"""`deltalens COMMAND ...`: find the command, read its options, run it, and say errors in one line.

The contract of a command module (`deltalens/cli/<command>.py`, named in `COMMANDS`):

* its docstring is the description that `deltalens <command> --help` shows;
* `add_arguments(parser)` declares options on a `jsonargparse.ArgumentParser` and imports no torch, so that help is
  fast. `main` has already added `--config FILE.yaml`: every option can also stand in a YAML file, and
  `--print_config` prints one; `main` also handles `--debug`, which may stand anywhere after the command;
* `run(args)` does the work. args: the parser's namespace. Returns None for success, or an exit code;
* optional `translate(argv) -> argv` rewrites the command's raw arguments before they are parsed.

Errors: raise ValueError, TypeError, FileNotFoundError... with a message for the user (what was wrong, what was
expected, what to do). What deltalens itself raises, and every OSError, is printed as one line on stderr, exit code 1;
any other exception is a defect and keeps its traceback. Wrong commands and options: exit code 2. Ctrl-C: 130.
"""

from __future__ import annotations

import argparse
import difflib
import dis
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {
    "demo": ("deltalens.cli.demo", "compare methods on real images with an embedded backbone, and write a report"),
    "train": ("deltalens.cli.train", "adapt a backbone to a folder of images"),
    "compare": ("deltalens.cli.compare", "run a study: methods x backbones x datasets x seeds, with one table"),
    "tune": ("deltalens.cli.tune", "search for the best settings of a method on the validation images"),
    "evaluate": ("deltalens.cli.evaluate", "measure a trained adapter on a folder of images"),
    "predict": ("deltalens.cli.predict", "classify images, folders or globs with a trained adapter"),
    "tile": ("deltalens.cli.tile", "cut large pictures with oriented boxes into tiles"),
    "search": ("deltalens.cli.search", "find images by text with a model of two towers"),
    "inspect": ("deltalens.cli.inspect", "show what a method would do to a model, before training"),
    "list": ("deltalens.cli.list", "list methods, models or recipes"),
    "analyze": ("deltalens.cli.analyze", "look into trained adapters: embeddings, attention, ensembles"),
    "bench": ("deltalens.cli.bench", "measure time and memory of the methods on this machine"),
}


class UsageError(Exception):
    """A wrong command or option."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. argv: the words after `deltalens`; None reads them from the process. Returns the exit
    code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    try:
        return _dispatch(argv)
    except SystemExit as finished:  # --help and --print_config
        return int(finished.code or 0)
    except KeyboardInterrupt as stopped:
        return _report(str(stopped) or "stopped by the keyboard", 130, debug)
    except UsageError as error:
        return _report(str(error), 2, debug)
    except BrokenPipeError:  # the reader of our output, such as head, went away
        sys.stderr.close()
        return 0
    except Exception as error:
        if _is_for_the_user(error):
            return _report(_one_line(error), 1, debug)
        traceback.print_exc()
        return _report(
            "this is a defect of deltalens or of a library below it: please report the lines above", 1, False
        )


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        import deltalens

        print(f"deltalens {deltalens.__version__}")
        return 0
    command, words = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command!r}; {hint}")
    module = importlib.import_module(COMMANDS[command][0])
    return run_command(command, module, words)


def run_command(command: str, module: ModuleType, words: list[str]) -> int:
    """Parse the words after a command's name with the module's options, and run it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"deltalens {command}", description=module.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these options; later words win over it"
    )
    module.add_arguments(parser)
    if hasattr(module, "translate"):
        words = module.translate(words)
    try:
        args = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(error, parser, command)) from error
    return module.run(args) or 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: deltalens COMMAND [options]\n\n"
        "Adapt frozen, pretrained vision models by training a few per cent of their parameters.\n\n"
        f"commands:\n{commands}\n\n"
        "deltalens COMMAND --help shows a command's options; --debug shows where an error comes from."
    )


def _explain(error: argparse.ArgumentError, parser: ArgumentParser, command: str) -> str:
    """The parser's message in one line, with the nearest option names where one is unknown."""
    message = re.sub(r"\s*\n\s*", " ", str(error))
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    unknown = re.search(r"unrecognized arguments: (\S+)", message) or re.search(
        r"Option '([^']+)' is not accepted", message
    )
    if unknown:
        word = unknown.group(1).partition("=")[0]
        near = difflib.get_close_matches("--" + word.lstrip("-"), options, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"deltalens {command} --help lists the options"
        return f"deltalens {command} has no option {word!r}; {hint}"
    return f"{message} (deltalens {command} --help lists the options)"


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error is a message to the user: from a `raise` in deltalens's code, or from the operating system."""
    if isinstance(error, OSError):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    raised = dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"
    return raised and Path(code.co_filename).is_relative_to(Path(__file__).parents[1])


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    return text or type(error).__name__


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"deltalens: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
