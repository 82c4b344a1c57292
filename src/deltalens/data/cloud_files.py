"""Files that hold one point cloud: .npy, .npz, .ply, .off, .xyz, .txt, .pts; meshes are sampled on their triangles."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np

from deltalens.data.meshes import sample_mesh
from deltalens.data.off_files import read_off
from deltalens.data.ply_files import read_ply

EXTENSIONS = {".npy", ".npz", ".off", ".ply", ".pts", ".txt", ".xyz"}
ARRAY_NAMES = ("points", "xyz", "pos", "pc", "cloud", "data")

# NumPy reads an array's header with `ast.literal_eval`, which two threads at once make fail with a SystemError
# (CPython before 3.11.8 and 3.12.2, gh-106905). What is slow, reading the file, stays outside the lock.
_HEADERS = threading.Lock()
_BROKEN = (OSError, ValueError, EOFError, IndexError, KeyError, OverflowError, zipfile.BadZipFile)


def read_cloud(path: str | os.PathLike) -> np.ndarray:
    """The points of a file, float32 (n, 3). Further columns (normals, colours) are dropped; a file with faces is a
    mesh, of which `deltalens.data.meshes.POINTS` points are drawn by area, the same ones every time.

    Raises ValueError with the file's name for what cannot be read, is empty, has another shape, or is not finite.
    """
    path = Path(path)
    try:
        return checked_cloud(_READERS[path.suffix.lower()](path))
    except FileNotFoundError:
        raise
    except KeyError as error:
        if path.suffix.lower() in _READERS:
            raise ValueError(f"cannot read the cloud {path}: {error} is missing") from error
        known = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"cannot read the cloud {path}: expected one of {known}") from error
    except _BROKEN as error:
        raise ValueError(f"cannot read the cloud {path}: {error}") from error


def checked_cloud(values: np.ndarray) -> np.ndarray:
    """(n, 3) float32 of an array with at least three columns. ValueError for what is no cloud."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers, found {values.dtype}")
    if values.ndim != 2 or values.shape[1] < 3:
        raise ValueError(f"expected an array (points, 3 or more), found the shape {tuple(values.shape)}")
    if not len(values):
        raise ValueError("it has no points")
    points = np.ascontiguousarray(values[:, :3], dtype=np.float32)
    if not np.isfinite(points).all():
        wrong = int((~np.isfinite(points).all(1)).sum())
        raise ValueError(f"{wrong} of {len(points)} points are NaN or infinite")
    return points


def cloud_files(folder: Path) -> list[Path]:
    """Every file under a folder that may hold a cloud, sorted; hidden ones passed over."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if is_cloud_file(name)]
    return sorted(found)


def is_cloud_file(name: str) -> bool:
    """Whether a file of that name may hold a cloud."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


# ------------------------------------------------------------------ one reader for each kind
def _read_npy(path: Path) -> np.ndarray:
    content = io.BytesIO(path.read_bytes())
    with _HEADERS:
        return np.lib.format.read_array(content, allow_pickle=False)


def _read_npz(path: Path) -> np.ndarray:
    content = io.BytesIO(path.read_bytes())
    if not zipfile.is_zipfile(content):
        raise ValueError("it is no archive of arrays, as numpy.savez writes it")
    content.seek(0)
    with _HEADERS, np.load(content, allow_pickle=False) as arrays:
        names = [name for name in ARRAY_NAMES if name in arrays.files]
        if not names and len(arrays.files) != 1:
            raise ValueError(
                f"it holds the arrays {', '.join(arrays.files) or 'none'}; expected one, or one called "
                f"{' or '.join(ARRAY_NAMES)}"
            )
        return arrays[names[0] if names else arrays.files[0]]


def _read_rows(path: Path) -> np.ndarray:
    """Rows of numbers between spaces or commas; # and // begin a remark; a first line of one number is a count."""
    with open(path, encoding="ascii", errors="strict") as stream:
        lines = [line for line in stream if line.strip() and not line.lstrip().startswith(("#", "//"))]
    if lines and len(lines[0].replace(",", " ").split()) == 1:
        lines = lines[1:]
    if not lines:
        return np.empty((0, 3))
    return np.loadtxt(lines, delimiter="," if "," in lines[0] else None, ndmin=2)


def _surface(vertices: np.ndarray, faces: list[np.ndarray]) -> np.ndarray:
    return sample_mesh(checked_cloud(vertices), faces) if faces else vertices


_READERS = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".off": lambda path: _surface(*read_off(path)),
    ".ply": lambda path: _surface(*read_ply(path)),
    ".pts": _read_rows,
    ".txt": _read_rows,
    ".xyz": _read_rows,
}
