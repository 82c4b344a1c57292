"""Options that may be given several times: argparse would take the last."""

from __future__ import annotations


def gather(argv: list[str], options: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """(the other words, option -> its words in order) of `--data A --data=B ...`."""
    rest, words = [], iter(argv)
    found: dict[str, list[str]] = {option: [] for option in options}
    for word in words:
        option, equals, value = word.partition("=")
        if option in found and (equals or (value := next(words, ""))):
            found[option].append(value)
        else:
            rest.append(word)
    return rest, found
