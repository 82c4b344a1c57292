"""Generated scenes: textured shapes that cast shadows on textured grounds, with exact masks, boxes and classes.

Shapes are the classes; colours and textures are drawn at random and tell nothing. Shapes lie over each other, and masks
and boxes are those of what is to be seen of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from deltalens.data.dense_items import MaskedImages, ObjectImages, Objects
from deltalens.data.drawn_shapes import COLOURS, SHAPES, TEXTURES
from deltalens.data.splits import Splits

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
GROUND = "ground"  # class 0 of segmentation
VAL_SCENES, TEST_SCENES = 24, 64
OBJECTS = (3, 7)  # in a scene
RADIUS = (0.09, 0.2)  # of a shape, as a share of the edge
SEEN = 0.5  # share of a shape that others leave to be seen at least
FINE = 4  # edges are drawn at this multiple of the size, then averaged
TINTS = ((122, 138, 92), (158, 140, 112), (112, 128, 142), (172, 162, 142), (96, 116, 110), (146, 120, 104))


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (S, S, 3), the masks of its objects, bool (n, S, S), which do not overlap, and their classes."""

    picture: np.ndarray
    masks: np.ndarray
    labels: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """(n, 4) of the smallest boxes about the masks, x1, y1, x2, y2."""
        boxes = np.zeros((len(self.masks), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    @property
    def semantic(self) -> np.ndarray:
        """uint8 (S, S): 0 for the ground, 1 + class for objects."""
        found = np.zeros(self.picture.shape[:2], np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            found[mask] = label + 1
        return found


def make_scenes(count: int = 200, size: int = 128, seed: int = 0, task: str = "segmentation") -> Splits:
    """`count` scenes for training, 24 for validation, 64 for the test, of size x size pixels, in memory.

    task: "segmentation" (classes: ground and six shapes), "detection" or "instance" (six shapes). The same numbers give
    the same scenes for every task; val and test do not depend on `count`. Raises ValueError for another task, no
    scenes, or less than 32 pixels.
    """
    if task not in ("segmentation", "detection", "instance"):
        raise ValueError(f"scenes are for segmentation, detection and instance, not for {task!r}")
    if count < 1 or size < 32:
        raise ValueError(f"scenes need a count from 1 and a size from 32 pixels, got {count} and {size}")
    counts = {"train": count, "val": VAL_SCENES, "test": TEST_SCENES}
    scenes = {
        part: [draw_scene(size, np.random.default_rng((seed, number, each))) for each in range(amount)]
        for number, (part, amount) in enumerate(counts.items())
    }
    origin = {"format": "scenes", "task": task, "seed": seed, "size": size}
    if task == "segmentation":
        parts = {part: _masked(found) for part, found in scenes.items()}
        return Splits(parts["train"], parts["val"], [GROUND, *CLASSES], parts["test"], origin, task)
    boxed = {part: _boxed(found, task == "instance") for part, found in scenes.items()}
    return Splits(boxed["train"], boxed["val"], list(CLASSES), boxed["test"], origin, task)


def draw_scene(size: int, random: np.random.Generator) -> Scene:
    """One scene. Every shape keeps at least half of itself to be seen."""
    picture = ground(size, random)
    owner = np.full((size, size), -1)  # the object that is seen at every pixel
    areas: list[int] = []
    labels: list[int] = []
    for _ in range(int(random.integers(OBJECTS[0], OBJECTS[1] + 1))):
        for _ in range(8):
            label = int(random.integers(len(CLASSES)))
            radius = size * random.uniform(*RADIUS)
            centre = random.uniform(radius * 0.8, size - radius * 0.8, 2)
            angle = random.uniform(-np.pi, np.pi)
            cover = _cover(CLASSES[label], size, centre, radius, angle)
            mask = cover >= 0.5
            left = np.bincount(owner[~mask & (owner >= 0)], minlength=len(areas))
            if mask.sum() >= 12 and all(left >= SEEN * np.array(areas)):
                picture = _painted(picture, cover, centre, radius, angle, random)
                owner[mask] = len(areas)
                areas.append(int(mask.sum()))
                labels.append(label)
                break
    picture = picture * light(size, random) + random.normal(0, 3.0, picture.shape)
    masks = owner == np.arange(len(areas))[:, None, None]
    return Scene(np.clip(picture, 0, 255).round().astype(np.uint8), masks, np.array(labels, np.int64))


# ------------------------------------------------------------------ datasets
def _masked(scenes: list[Scene]) -> MaskedImages:
    masks = [scene.semantic for scene in scenes]
    present = [[(mask == label).any() for label in range(len(CLASSES) + 1)] for mask in masks]
    return MaskedImages([scene.picture for scene in scenes], masks, np.arange(256, dtype=np.uint8), np.array(present))


def _boxed(scenes: list[Scene], masks: bool) -> ObjectImages:
    objects = [
        Objects.of(
            scene.boxes,
            scene.labels,
            scene.masks.sum((1, 2)),
            outlines=list(scene.masks.astype(np.uint8)) if masks else (),
        )
        for scene in scenes
    ]
    sizes = [scene.picture.shape[:2] for scene in scenes]
    ids = range(1, len(scenes) + 1)
    return ObjectImages([scene.picture for scene in scenes], objects, ids, sizes, len(CLASSES), masks)


# ------------------------------------------------------------------ drawing
def _cover(name: str, size: int, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Share of every pixel that lies in the shape, (size, size)."""
    turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    low = np.maximum(np.floor(centre - 1.3 * radius).astype(int), 0)
    high = np.minimum(np.ceil(centre + 1.3 * radius).astype(int), size)
    canvas = Image.new("L", tuple(((high - low) * FINE).tolist()), 0)
    pen = ImageDraw.Draw(canvas)
    for i, outline in enumerate(SHAPES[name]):
        points = ((outline @ turned) * radius + centre - low) * FINE
        pen.polygon([tuple(point) for point in points.tolist()], fill=255 if i == 0 else 0)
    fine = np.asarray(canvas, np.float32).reshape(high[1] - low[1], FINE, high[0] - low[0], FINE)
    cover = np.zeros((size, size), np.float32)
    cover[low[1] : high[1], low[0] : high[0]] = fine.mean((1, 3)) / 255
    return cover


def _painted(
    picture: np.ndarray,
    cover: np.ndarray,
    centre: np.ndarray,
    radius: float,
    angle: float,
    random: np.random.Generator,
) -> np.ndarray:
    """The picture with a shape of a random colour and texture on it, and its shadow at the lower right."""
    names = tuple(COLOURS)
    first, second = (np.array(COLOURS[names[i]], float) for i in random.choice(len(names), 2, replace=False))
    first, second = (
        first * random.uniform(0.8, 1.1),
        0.45 * first + 0.55 * np.where(random.random() < 0.5, 245.0, second),
    )
    texture = tuple(TEXTURES.values())[int(random.integers(len(TEXTURES)))]
    low = np.maximum(np.floor(centre - 1.3 * radius).astype(int), 0)
    high = np.minimum(np.ceil(centre + 1.6 * radius).astype(int), len(picture))  # with the shadow
    x, y = ((np.arange(2 * (high[i] - low[i])) + 0.5) / 2 + low[i] - centre[i] for i in (0, 1))
    x, y = np.broadcast_arrays(x[None, :] / radius, y[:, None] / radius)
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    marks = texture(u, v).astype(np.float32).reshape(len(x) // 2, 2, -1, 2).mean((1, 3))[..., None]
    shade = 1.06 - 0.16 * np.clip((x + y)[::2, ::2, None] / 2, -1, 1)  # lit from the upper left
    paint = (first * (1 - marks) + second * marks) * shade
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    cover = cover[window]
    shift = max(1, round(0.16 * radius))
    moved = np.pad(cover, ((shift, 0), (shift, 0)))[: len(cover), : cover.shape[1]]
    shadow = blurred(moved, max(1, round(0.12 * radius)))[..., None]
    cover = cover[..., None]
    picture = picture.copy()
    picture[window] = picture[window] * (1 - 0.5 * shadow) * (1 - cover) + paint * cover
    return picture


def blurred(values: np.ndarray, reach: int) -> np.ndarray:
    """Means over squares of 2 reach + 1 pixels."""
    window = 2 * reach + 1
    sums = np.pad(values, reach, mode="edge").cumsum(0).cumsum(1)
    sums = np.pad(sums, ((1, 0), (1, 0)))
    total = sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]
    return total / window**2


def ground(size: int, random: np.random.Generator) -> np.ndarray:
    """Two tints of one colour mixed by smooth noise, which may be drawn out in one direction, with fine grain."""
    tint = np.array(TINTS[int(random.integers(len(TINTS)))], float) * random.uniform(0.85, 1.15) + random.normal(
        0, 6, 3
    )
    other = tint * random.uniform(0.55, 0.8) + random.normal(0, 8, 3)
    stretch = [1.0, 1.0]
    if random.random() < 0.5:
        stretch[int(random.integers(2))] = random.uniform(3, 6)  # grain of wood, or furrows
    mixed = np.zeros((size, size))
    for cells, weight in ((4, 0.4), (9, 0.3), (20, 0.2), (45, 0.1)):
        grid = random.random([max(2, round(cells * factor)) for factor in stretch]).astype(np.float32)
        mixed += weight * np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))
    mixed = np.clip((mixed - 0.5) * 2.2 + 0.5, 0, 1)[..., None]
    return tint * mixed + other * (1 - mixed)


def light(size: int, random: np.random.Generator) -> np.ndarray:
    """A slow change of brightness across the picture, (size, size, 1)."""
    line = np.linspace(-1, 1, size)
    angle, strength = random.uniform(0, 2 * np.pi), random.uniform(0, 0.18)
    return 1 + strength * (np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None])[..., None]
