"""The log of a pretraining: a row of a CSV file and a line on the terminal."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, behind a header where the file is new, and print it."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
