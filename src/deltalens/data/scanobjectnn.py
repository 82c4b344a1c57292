"""ScanObjectNN (Uy et al. 2019): objects cut from scans of rooms, 2,048 points each, 15 classes, in HDF5 files.

Three variants: "bg" with background (OBJ_BG), "only" without it (OBJ_ONLY), and "hardest", moved, turned and scaled
(PB_T50_RS). Train and test are official, val is split off train by seed. h5py is an extra
(`pip install "deltalens[points]"`) and imported only here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deltalens.data.assemble import assemble
from deltalens.data.clouds import CloudArrays
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

CLASS_NAMES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip
VARIANTS = {
    "bg": ("main_split", "objectdataset.h5"),
    "only": ("main_split_nobg", "objectdataset.h5"),
    "hardest": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}
PARTS = {"train": "training", "test": "test"}
EXPECTED = """expected the files of ScanObjectNN, which its authors give out (https://hkust-vgd.github.io/scanobjectnn):
    {root}/main_split/training_objectdataset.h5, test_objectdataset.h5                  (scanobjectnn/bg)
    {root}/main_split_nobg/training_objectdataset.h5, test_objectdataset.h5             (scanobjectnn/only)
    {root}/main_split/training_objectdataset_augmentedrot_scale75.h5, test_...          (scanobjectnn/hardest)"""


def recognise(root: Path) -> str | None:
    """ "scanobjectnn/<variant>" where one is there, "scanobjectnn" for several."""
    there = [which for which in VARIANTS if all(file.is_file() for file in _files(root, which).values())]
    if not there:
        return None
    return f"scanobjectnn/{there[0]}" if len(there) == 1 else "scanobjectnn"


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The formats "scanobjectnn/bg", "scanobjectnn/only" and "scanobjectnn/hardest"."""
    refuse_variant("scanobjectnn", which, tuple(VARIANTS))
    which = which or (recognise(root) or "").partition("/")[2]
    if not which:
        raise ValueError(f"name the variant: scanobjectnn/{', scanobjectnn/'.join(VARIANTS)}; {_expected(root)}")
    parts = {}
    for part, file in _files(root, which).items():
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}; {_expected(root)}")
        parts[part] = _read_file(file)
    return assemble(parts, CLASS_NAMES, options, {"kind": "points"})


def _files(root: Path, which: str) -> dict[str, Path]:
    """Part -> file. The folder may be that of all variants, or, for two of them, main_split itself."""
    folder, name = VARIANTS[which]
    start = root if root.name == folder else root / folder
    return {part: start / f"{begin}_{name}" for part, begin in PARTS.items()}


def _read_file(file: Path) -> CloudArrays:
    try:
        import h5py
    except ImportError:
        raise ValueError('the format scanobjectnn needs the library h5py: pip install "deltalens[points]"') from None
    try:
        with h5py.File(file, "r") as content:
            missing = [name for name in ("data", "label") if name not in content]
            if missing:
                raise ValueError(f"it has no dataset {missing[0]}, but {', '.join(content) or 'none'}")
            clouds, labels = np.asarray(content["data"]), np.asarray(content["label"]).reshape(-1)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if clouds.ndim != 3 or clouds.shape[2] < 3 or len(clouds) != len(labels):
        raise ValueError(
            f"{file} has data {clouds.shape} and label {labels.shape}; expected (clouds, points, 3) and (clouds,)"
        )
    if labels.dtype.kind not in "iu" or (len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASS_NAMES)):
        raise ValueError(f"{file} has labels other than 0 to {len(CLASS_NAMES) - 1}")
    return CloudArrays(list(clouds), labels.tolist(), names=[f"{file.name}[{i}]" for i in range(len(labels))])


def _expected(root: Path) -> str:
    return EXPECTED.format(root=root)
