"""The format "ade20k": the 150 classes of the scene parsing benchmark (ADEChallengeData2016)."""

from __future__ import annotations

from pathlib import Path

from deltalens.data.assemble import existing
from deltalens.data.image_folder import image_files
from deltalens.data.mask_folders import pair_files
from deltalens.data.mask_parts import Meaning, mask_splits
from deltalens.data.options import ReadOptions, refuse_variant
from deltalens.data.splits import Splits

NAME = "ade20k"
EXPECTED = """expected in {root}, or in its folder ADEChallengeData2016:
    images/training/*.jpg       annotations/training/*.png     (0: no class, 1 to 150: the classes)
    images/validation/*.jpg     annotations/validation/*.png"""
PARTS = {"train": "training", "test": "validation"}
NAMES = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base,
box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen
island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy,
washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor,
bulletin board, shower, radiator, glass, clock, flag"""
CLASSES = tuple(" ".join(name.split()) for name in NAMES.split(","))


def tasks(root: Path) -> tuple[str, ...]:
    """("segmentation",) where pictures are called as in ADE20K, otherwise ()."""
    folder = _folder(root)
    first = next((folder / "images/training").glob("ADE_train_*"), None) if folder else None
    return ("segmentation",) if first else ()


def recognise(root: Path) -> str | None:
    return NAME if tasks(root) else None


def read(root: Path, which: str, options: ReadOptions) -> Splits:
    """The format "ade20k" of `deltalens.data.read_data`, task "segmentation".

    Masks are shifted by one: 0 is ignored, 1 to 150 are the classes 0 to 149. The labels of the benchmark's test part
    are not public: "validation", on which papers report, is the test part here, and val is split off training by seed.
    `protocol="trainval"` trains on all of it.
    """
    refuse_variant(NAME, which)
    expected = EXPECTED.format(root=root)
    folder = _folder(existing(root, expected))
    if folder is None:
        raise ValueError(f"{root} has no images/training and annotations/training; {expected}")
    parts = {}
    for part, name in PARTS.items():
        pictures, masks = folder / "images" / name, folder / "annotations" / name
        if pictures.is_dir():
            parts[part] = pair_files(image_files(pictures), pictures, masks, image_files(masks), ("",), expected)
    meaning = Meaning(list(CLASSES), {label + 1: label for label in range(len(CLASSES))}, frozenset({0}))
    return mask_splits(parts, meaning, options, {"test": "validation"} if "test" in parts else {})


def _folder(root: Path) -> Path | None:
    for folder in (root, root / "ADEChallengeData2016"):
        if (folder / "images/training").is_dir() and (folder / "annotations/training").is_dir():
            return folder
    return None
