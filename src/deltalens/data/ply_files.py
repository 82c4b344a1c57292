"""Stanford's PLY, as text and binary in both byte orders: the vertices' positions, and the faces where it has some."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
LONGEST_HEADER = 1000  # lines


@dataclass
class _Element:
    """properties: (name, type, type of a list's length or None)."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)


def read_ply(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """(vertices (n, 3), vertex numbers of each face; empty for a cloud). ValueError for a file that is no PLY, has
    vertices without x, y, z, or ends too early."""
    with open(path, "rb") as stream:
        order, elements = _header(stream)
        read = _text_reader(stream) if order == "" else _binary_reader(stream, order)
        vertices, faces = None, []
        for element in elements:
            columns = read(element)
            if element.name == "vertex":
                missing = [name for name in "xyz" if name not in columns]
                if missing:
                    raise ValueError(f"its vertices have no {', '.join(missing)}")
                vertices = np.stack([np.asarray(columns[name], dtype=np.float64) for name in "xyz"], 1)
            elif element.name == "face":
                faces = next((columns[name] for name in ("vertex_indices", "vertex_index") if name in columns), [])
    if vertices is None:
        raise ValueError("it has no vertices")
    return vertices, list(faces)


def _header(stream: BinaryIO) -> tuple[str, list[_Element]]:
    """(byte order, "" for text; the elements in their order)."""
    if stream.readline(16).strip() != b"ply":
        raise ValueError("it does not begin with ply")
    order, elements = None, []
    for _ in range(LONGEST_HEADER):
        words = stream.readline(4096).decode("ascii", "replace").split()
        if words[:1] == ["end_header"]:
            if order is None:
                raise ValueError("its header names no format")
            return order, elements
        if words[:1] == ["format"] and len(words) > 1:
            if words[1] not in ORDERS:
                raise ValueError(f"its format {words[1]} is not one of {', '.join(ORDERS)}")
            order = ORDERS[words[1]]
        elif words[:1] == ["element"] and len(words) == 3:
            elements.append(_Element(words[1], int(words[2])))
        elif words[:1] == ["property"] and elements:
            listed = words[1] == "list"
            if len(words) != (5 if listed else 3) or any(word not in TYPES for word in words[1 + listed : -1]):
                raise ValueError(f"its header has a wrong line: {' '.join(words)}")
            length = TYPES[words[2]] if listed else None
            elements[-1].properties.append((words[-1], TYPES[words[-2]], length))
    raise ValueError("its header does not end")


def _text_reader(stream: BinaryIO):
    words = iter(stream.read().split())

    def number(kind: str) -> float:
        word = next(words, None)
        if word is None:
            raise ValueError("it ends early")
        return float(word) if kind[0] == "f" else int(word)

    def read(element: _Element) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name, *_ in element.properties}
        for _ in range(element.count):
            for name, kind, length in element.properties:
                if length is None:
                    columns[name].append(number(kind))
                else:
                    columns[name].append(np.array([number(kind) for _ in range(int(number(length)))], dtype=kind))
        return columns

    return read


def _binary_reader(stream: BinaryIO, order: str):
    data, place = stream.read(), 0

    def take(kind: str | list[tuple[str, str]], count: int) -> np.ndarray:
        nonlocal place
        dtype = np.dtype(order + kind if isinstance(kind, str) else kind)
        if count < 0 or place + count * dtype.itemsize > len(data):
            raise ValueError("it ends early")
        values = np.frombuffer(data, dtype, count, place)
        place += count * dtype.itemsize
        return values

    def read(element: _Element) -> dict:
        if all(length is None for *_, length in element.properties):
            rows = take([(name, order + kind) for name, kind, _ in element.properties], element.count)
            return {name: rows[name] for name, *_ in element.properties}
        columns: dict[str, list] = {name: [] for name, *_ in element.properties}
        for _ in range(element.count):
            for name, kind, length in element.properties:
                size = 1 if length is None else int(take(length, 1)[0])
                columns[name].append(take(kind, size) if length is not None else take(kind, 1)[0])
        return columns

    return read
