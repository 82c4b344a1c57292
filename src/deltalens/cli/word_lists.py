"""Several words in one option: a list, a text with commas, or a file with one a line."""

from __future__ import annotations

from collections.abc import Sequence


def read_words(given: str | Sequence[str] | None, what: str, commas: bool = False) -> list[str] | None:
    """The words of an option that takes a text or a list, in order; None for None.

    A text that ends with .txt is a file with one on a line; one that begins with [ is a list in JSON's form; commas
    says whether another one is cut at its commas. what: what the words are, for messages: "classes".

    Raises FileNotFoundError, and ValueError for none, empty or repeated words and for no list.
    """
    if given is None:
        return None
    if not isinstance(given, str):
        words = list(given)
    elif given.lower().endswith(".txt"):
        words = _lines(given)
    elif given.lstrip().startswith("["):
        words = _list(given, what)
    else:
        words = given.split(",") if commas else [given]
    words = [word.strip() for word in words]
    if not words:
        raise ValueError(f"{given!r} names no {what}")
    if "" in words:
        raise ValueError(f"number {words.index('') + 1} of the {len(words)} {what} is empty")
    repeated = next((word for i, word in enumerate(words) if word in words[:i]), None)
    if repeated is not None:
        raise ValueError(f"{repeated!r} is twice among the {what}")
    return words


def _lines(file: str) -> list[str]:
    from pathlib import Path

    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}: what ends with .txt is a file with one on a line")
    return Path(file).read_text(encoding="utf-8-sig").rstrip().splitlines()


def _list(text: str, what: str) -> list[str]:
    import json

    try:
        words = json.loads(text)
    except json.JSONDecodeError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'{text} is no list of {what}: write each in quotes, as in \'["a, b", "c"]\'')
    return words
