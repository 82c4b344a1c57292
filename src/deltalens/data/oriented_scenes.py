"""Generated scenes seen from above: ships, trucks and planes at any angle, with exact oriented boxes.

Shapes are the classes; colours, sizes and angles are drawn at random and tell nothing. Half of them stand in rows, side
by side, where upright boxes would cover each other. Grounds and light are those of `deltalens.data.scenes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from deltalens.data.drawn_shapes import COLOURS
from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.scenes import FINE, TEST_SCENES, VAL_SCENES, blurred, ground, light
from deltalens.data.splits import Splits

Points = tuple[tuple[float, float], ...]
GROUPS = (2, 4)  # in a scene
ROW = 3  # objects of one group at most
GAP = 1.3  # from middle to middle in a row, in widths
TRIES = 8


@dataclass(frozen=True)
class Shape:
    """A thing seen from above, heading along x. outline: in -1..1 along (x) and across (y), reaching all four. dark,
    bright: polygons on it. length: range, as a share of the picture's edge. ratio: range of length to width."""

    outline: Points
    dark: tuple[Points, ...]
    bright: tuple[Points, ...]
    length: tuple[float, float]
    ratio: tuple[float, float]


def _rectangle(left: float, right: float, half: float) -> Points:
    return ((left, -half), (right, -half), (right, half), (left, half))


def _mirrored(*upper: tuple[float, float]) -> Points:
    """An outline from one of its halves, from bow to stern."""
    return (*upper, *((x, -y) for x, y in reversed(upper)))


SHAPES = {
    "ship": Shape(
        _mirrored((1, 0.04), (0.72, 0.6), (0.45, 1), (-0.9, 1), (-1, 0.75)),
        (_rectangle(-0.3, -0.02, 0.62), _rectangle(0.08, 0.36, 0.62)),
        (_rectangle(-0.82, -0.5, 0.68),),
        (0.3, 0.5),
        (3.4, 4.6),
    ),
    "truck": Shape(
        _mirrored((1, 0.8), (0.96, 1), (-1, 1)),
        (_rectangle(0.45, 0.55, 1), _rectangle(0.78, 0.9, 0.75)),
        (_rectangle(-0.92, 0.38, 0.12),),
        (0.2, 0.3),
        (2.0, 2.5),
    ),
    "plane": Shape(
        _mirrored(
            (1, 0.03), (0.8, 0.14), (0.3, 0.15), (-0.22, 1), (-0.45, 1), (-0.2, 0.15), (-0.72, 0.11), (-0.86, 0.45),
            (-1, 0.45), (-0.95, 0.05),
        ),
        (_rectangle(0.68, 0.78, 0.1),),
        (_rectangle(-0.9, 0.6, 0.045),),
        (0.28, 0.42),
        (1.1, 1.3),
    ),
}  # fmt: skip
CLASSES = tuple(SHAPES)


@dataclass(frozen=True)
class OrientedScene:
    """A picture, uint8 (S, S, 3), the corners (n, 4, 2) of its objects, from the front on the left clockwise, and their
    classes."""

    picture: np.ndarray
    corners: np.ndarray
    labels: np.ndarray


def make_oriented_scenes(count: int = 200, size: int = 128, seed: int = 0) -> Splits:
    """`count` scenes for training, 24 for validation, 64 for the test, of size x size pixels, in memory.

    Boxes are the smallest rectangles along the heading of a ship, truck or plane; the shadows are not in them, and all
    lie in the picture. The same numbers give the same scenes; val and test do not depend on `count`. Raises ValueError
    for no scenes, or less than 64 pixels.
    """
    if count < 1 or size < 64:
        raise ValueError(f"oriented scenes need a count from 1 and a size from 64 pixels, got {count} and {size}")
    counts = {"train": count, "val": VAL_SCENES, "test": TEST_SCENES}
    parts = {
        part: _dataset([draw_oriented_scene(size, np.random.default_rng((seed, number, i))) for i in range(amount)])
        for number, (part, amount) in enumerate(counts.items())
    }
    origin = {"format": "oriented-scenes", "task": "oriented", "seed": seed, "size": size, "metrics": "voc07"}
    return Splits(parts["train"], parts["val"], list(CLASSES), parts["test"], origin, "oriented")


def draw_oriented_scene(size: int, random: np.random.Generator) -> OrientedScene:
    """One scene with at least one object; objects do not lie over each other."""
    picture = ground(size, random)
    taken = np.zeros((size, size), np.float32)
    corners: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(int(random.integers(GROUPS[0], GROUPS[1] + 1))):
        label = int(random.integers(len(CLASSES)))
        shape = SHAPES[CLASSES[label]]
        length = size * random.uniform(*shape.length)
        half = np.array([length, length / random.uniform(*shape.ratio)]) / 2
        colour = np.array(COLOURS[tuple(COLOURS)[int(random.integers(len(COLOURS)))]], float)
        places = _places(taken, half, random)
        for frame in places:
            bright = 0.55 * colour + 0.45 * 245 * random.uniform(0.8, 1)
            taken = np.maximum(taken, _cover([_placed(shape.outline, frame)], size))
            picture = _painted(picture, shape, frame, colour * random.uniform(0.85, 1.1), bright)
            corners.append(_placed(_rectangle(-1, 1, 1), frame))
            labels.append(label)
    if not labels:  # nothing fitted: as good as never
        return draw_oriented_scene(size, random)
    picture = picture * light(size, random) + random.normal(0, 3.0, picture.shape)
    return OrientedScene(np.clip(picture, 0, 255).round().astype(np.uint8), np.array(corners), np.array(labels))


@dataclass(frozen=True)
class _Frame:
    """Where an object lies: the middle, half its length and width, its heading in radians, clockwise."""

    middle: np.ndarray
    half: np.ndarray
    angle: float


def _dataset(scenes: list[OrientedScene]) -> OrientedImages:
    objects = [OrientedObjects.of(scene.corners, scene.labels) for scene in scenes]
    sizes = [scene.picture.shape[:2] for scene in scenes]
    return OrientedImages([scene.picture for scene in scenes], objects, range(1, len(scenes) + 1), sizes, len(CLASSES))


def _places(taken: np.ndarray, half: np.ndarray, random: np.random.Generator) -> list[_Frame]:
    """Frames of one group, a single object or a row, where nothing is yet; none where there is no room."""
    size = len(taken)
    amount = 1 if random.random() < 0.5 else int(random.integers(2, ROW + 1))
    for _ in range(TRIES):
        angle = random.uniform(-np.pi, np.pi)
        across = np.array([-np.sin(angle), np.cos(angle)]) * 2 * half[1] * GAP
        first = random.uniform(0.1 * size, 0.9 * size, 2)
        frames = [_Frame(first + i * across, half, angle) for i in range(amount)]
        outlines = [_placed(_rectangle(-1, 1, 1), frame) for frame in frames]
        if all(outline.min() >= 1 and outline.max() <= size - 1 for outline in outlines):
            around = [_placed(_rectangle(-1.1, 1.1, 1.15), frame) for frame in frames]
            if not (taken * _cover(around, size)).any():
                return frames
    return []


def _placed(points: Points, frame: _Frame) -> np.ndarray:
    """Points of a shape in the picture's pixels, (k, 2)."""
    cos, sin = np.cos(frame.angle), np.sin(frame.angle)
    turned = (np.array(points) * frame.half) @ np.array([[cos, sin], [-sin, cos]])
    return np.asarray(turned + frame.middle)


def _cover(polygons: list[np.ndarray], size: int) -> np.ndarray:
    """Share of every pixel that lies in one of the polygons, (size, size)."""
    low = np.clip(np.floor(np.min([each.min(0) for each in polygons], 0)).astype(int), 0, size - 1)
    high = np.clip(np.ceil(np.max([each.max(0) for each in polygons], 0)).astype(int), low + 1, size)
    canvas = Image.new("L", tuple(((high - low) * FINE).tolist()), 0)
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        pen.polygon([tuple(point) for point in ((polygon - low) * FINE - 0.5).tolist()], fill=255)
    fine = np.asarray(canvas, np.float32).reshape(high[1] - low[1], FINE, high[0] - low[0], FINE)
    cover = np.zeros((size, size), np.float32)
    cover[low[1] : high[1], low[0] : high[0]] = fine.mean((1, 3)) / 255
    return cover


def _painted(picture: np.ndarray, shape: Shape, frame: _Frame, colour: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """The picture with an object on it, and its shadow at the lower right."""
    size = len(picture)
    cover = _cover([_placed(shape.outline, frame)], size)
    shift = max(1, round(0.25 * frame.half.min()))
    moved = np.pad(cover, ((shift, 0), (shift, 0)))[:size, :size]
    shadow = blurred(moved, max(1, round(0.1 * frame.half.min())))[..., None]
    picture = picture * (1 - 0.5 * shadow)
    for polygons, paint in (((shape.outline,), colour), (shape.dark, 0.4 * colour), (shape.bright, bright)):
        share = np.minimum(_cover([_placed(each, frame) for each in polygons], size), cover)[..., None]
        picture = picture * (1 - share) + paint * share
    return picture
