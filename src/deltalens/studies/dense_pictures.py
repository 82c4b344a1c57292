"""Masks, boxes, oriented boxes and instances drawn into pictures, with names and scores."""

from __future__ import annotations

import colorsys
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from deltalens.models.oriented_boxes import corners_of
from deltalens.studies.dense_measure import Found
from deltalens.studies.figure import check_kind, page_colours, save_figure
from deltalens.tasks import Detection

Colour = tuple[int, int, int]
Point = tuple[float, float]
FIRST: tuple[Colour, ...] = (  # told apart on photographs, and by most who see few colours
    (230, 75, 53), (0, 130, 200), (60, 180, 75), (245, 200, 30), (145, 30, 180), (70, 220, 230),
    (245, 130, 48), (240, 50, 230), (0, 128, 128), (170, 110, 40), (128, 0, 0), (128, 128, 0),
)  # fmt: skip
IGNORED = 255
LEAST_SIDE, MOST_SIDE = 480, 1600  # of the long side of drawn pictures: small ones are enlarged so that words fit
MOST = 500  # pictures of a sheet
PANEL = 3.4  # inches
INK, PAPER = (34, 36, 42), (255, 255, 255)


def class_colours(count: int) -> list[Colour]:
    """A colour for each class; beyond the first dozen hues go around by the golden angle."""
    colours = list(FIRST[:count])
    for number in range(len(colours), count):
        light = (0.95, 0.7, 0.85)[number % 3]
        rgb = colorsys.hsv_to_rgb(number * 0.61803398875 % 1, (0.75, 0.9, 0.5)[number // 3 % 3], light)
        colours.append(tuple(round(255 * part) for part in rgb))  # type: ignore[arg-type]
    return colours


def drawn(found: Found, class_names: Sequence[str]) -> Image.Image:
    """The picture with what was found in it."""
    if found.mask is not None:
        return drawn_mask(found.picture, found.mask, class_names)
    return drawn_objects(found.picture, found.detections, class_names)


# ------------------------------------------------------------------ segmentation
def drawn_mask(picture: Image.Image, mask: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Classes as colours over the picture, ignored pixels as they are, and below it the names of the classes there,
    with their shares."""
    large = _enlarged(picture)
    classes = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(large.size, Image.Resampling.NEAREST))
    colours = np.array([*class_colours(len(class_names)), *[(0, 0, 0)] * (256 - len(class_names))], np.float32)
    weight = np.where(classes < len(class_names), 0.55, 0.0)[..., None]
    pixels = (1 - weight) * np.asarray(large, np.float32) + weight * colours[classes]
    edges = _edges(classes)
    pixels[edges] = 0.35 * pixels[edges] + 0.65 * 255
    return _with_legend(Image.fromarray(pixels.round().astype(np.uint8)), _shares(mask, class_names))


def _edges(classes: np.ndarray) -> np.ndarray:
    """Where the class at the right or below is another."""
    edges = np.zeros(classes.shape, bool)
    edges[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    edges[:-1] |= classes[:-1] != classes[1:]
    return edges


def _shares(mask: np.ndarray, class_names: Sequence[str]) -> list[tuple[Colour, str]]:
    counts = np.bincount(mask.reshape(-1).astype(np.int64), minlength=256)[: len(class_names)]
    known, colours = max(1, counts.sum()), class_colours(len(class_names))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    return [(colours[i], f"{class_names[i]} {_per_cent(counts[i] / known)}") for i in order]


def _per_cent(share: float) -> str:
    return "<1%" if share < 0.005 else f"{share:.0%}"


# ------------------------------------------------------------------ objects
def drawn_objects(
    picture: Image.Image, detections: Sequence[Detection], class_names: Sequence[str], most_words: int = 40
) -> Image.Image:
    """Boxes, upright or oriented, and of instances masks, with names and scores where there is room for them, the
    better ones first; below, where some have no name, how many there are of each class.

    Boxes have the colours of their classes; masks of one class each a colour of their own.
    """
    large = _enlarged(picture)
    scale = large.width / picture.width
    by_class = class_colours(len(class_names))
    masks = any(each.mask is not None for each in detections)
    own = masks and len({each.name for each in detections}) < 2
    several = class_colours(len(detections)) if own else []
    colours = [several[i] if own else by_class[list(class_names).index(each.name)] for i, each in enumerate(detections)]
    if masks:
        large = _with_masks(large, detections, colours)
    draw, font = ImageDraw.Draw(large), _font(large)
    boxes = [tuple(scale * side for side in each.box) for each in detections]
    line = max(2, round(font.size / 7))
    outlines = [_outline(each, scale) for each in detections]
    for box, outline, colour in zip(boxes, outlines, colours, strict=True):
        if outline:
            draw.line(
                [*outline, *outline[:2]], fill=colour, width=max(line, round(font.size / 5)), joint="curve"
            )  # past the end: closed corners
        else:
            draw.rectangle(box, outline=colour, width=line if not masks else max(1, line // 2))
    taken: list[tuple[float, float, float, float]] = []
    for each, box, outline, colour in list(zip(detections, boxes, outlines, colours, strict=True))[:most_words]:
        text = f"{each.name} {each.score:.2f}" if each.score < 1 else each.name
        width, height = font.getlength(text) + 6, font.size + 4
        corners = _beside_outline(outline, width, height) if outline else _beside_box(box, width, height)
        place = _place(corners, width, height, large.size, taken)
        if place is not None:
            taken.append(place)
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + 3, place[1] + 1), text, fill=_readable(colour), font=font)
    if len(taken) == len(detections):
        return large
    counts = Counter(each.name for each in detections)
    said = [
        (None if own else by_class[list(class_names).index(name)], f"{n} {name}") for name, n in counts.most_common()
    ]
    return _with_legend(large, said)


def _with_masks(image: Image.Image, detections: Sequence[Detection], colours: Sequence[Colour]) -> Image.Image:
    pixels = np.asarray(image, np.float32).copy()
    for each, colour in reversed(list(zip(detections, colours, strict=True))):  # the best on top
        if each.mask is None:
            continue
        mask = Image.fromarray(each.mask.cpu().numpy().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        inside = np.asarray(mask) > 0
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(colour, np.float32)
        edge = _edges(np.asarray(mask))
        pixels[edge] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _outline(one: Detection, scale: float) -> list[Point]:
    """The corners of an oriented box in the drawn picture, none of an upright one."""
    if one.oriented is None:
        return []
    corners = scale * corners_of(torch.tensor(one.oriented, dtype=torch.float64))
    return [(x, y) for x, y in corners.tolist()]


def _beside_box(box: Sequence[float], width: float, height: float) -> list[Point]:
    """Where a word of this size may begin (left, top): above the box, inside of it or below."""
    if width > 1.6 * (box[2] - box[0]):  # a word much wider than its box hides others, and which one it is of
        return []
    return [(box[0], top) for top in (box[1] - height, box[1], box[3])]


def _beside_outline(corners: Sequence[Point], width: float, height: float) -> list[Point]:
    """The same about an oriented box: over its top corner, below its lowest, on its middle."""
    if width > 1.6 * max(math.dist(corners[0], corners[1]), math.dist(corners[1], corners[2])):
        return []
    top, bottom = min(corners, key=lambda point: point[1]), max(corners, key=lambda point: point[1])
    middle = (sum(x for x, _ in corners) / 4, sum(y for _, y in corners) / 4)
    starts = ((top[0], top[1] - height), bottom, (middle[0], middle[1] - height / 2))
    return [(x - width / 2, y) for x, y in starts]


def _place(
    starts: Sequence[Point], width: float, height: float, size: tuple[int, int], taken: Sequence[tuple]
) -> tuple[float, float, float, float] | None:
    """The first of these places that is free and in the picture, moved sideways into it; None where there is none."""
    for start, top in starts:
        left = min(max(0.0, start), max(0.0, size[0] - width))
        place = (left, top, left + width, top + height)
        inside = top >= 0 and top + height <= size[1]
        if inside and not any(
            place[0] < t[2] and t[0] < place[2] and place[1] < t[3] and t[1] < place[3] for t in taken
        ):
            return place
    return None


# ------------------------------------------------------------------ sheets
def plot_sheet(pictures: Sequence[tuple[str, Image.Image]], path: str | os.PathLike) -> None:
    """Drawn pictures with their names side by side, as SVG, PNG or PDF. ValueError for more than 500."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_kind(path)
    if not 0 < len(pictures) <= MOST:
        raise ValueError(
            f"a sheet holds 1 to {MOST} pictures, and these are {len(pictures)}: --format pictures draws each in a file"
        )
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    shapes = [min(1.6, image.height / image.width) for _, image in pictures]
    heights = [PANEL * max(shapes[columns * row :][:columns]) + 0.35 for row in range(rows)]
    figure = Figure(figsize=(PANEL * columns, sum(heights)), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ink = page_colours()["ink"]
    for number, axis in enumerate(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()):
        axis.set_axis_off()
        axis.set_anchor("N")
        if number < len(pictures):
            name, image = pictures[number]
            axis.imshow(image, interpolation="antialiased")
            title = axis.set_title(name, fontsize=8.5, color=ink, loc="left")
            title.set_parse_math(False)
    save_figure(figure, path)


def palette(count: int) -> list[int]:
    """Of a PNG with class numbers: the classes' colours, then black, and white for 255."""
    colours = [*class_colours(count), *[(0, 0, 0)] * (255 - count), (255, 255, 255)]
    return [part for colour in colours for part in colour]


# ------------------------------------------------------------------ words
def _with_legend(image: Image.Image, entries: Sequence[tuple[Colour | None, str]]) -> Image.Image:
    """Words below a picture, each behind a square of its colour, if it has one. A picture narrower than a word gets
    paper at its right."""
    font = _font(image)
    size, margin = int(font.size), int(font.size) // 2
    widths = [round((1.4 * size if colour else 0) + font.getlength(text)) for colour, text in entries]
    page_width = max([image.width, *(width + 2 * margin for width in widths)])
    places, x, y = [], margin, margin
    for width in widths:
        if x > margin and x + width > page_width - margin:
            x, y = margin, y + round(1.5 * size)
        places.append((x, y))
        x += width + size
    page = Image.new("RGB", (page_width, image.height + (y + round(1.5 * size) + margin if entries else 0)), PAPER)
    page.paste(image)
    draw = ImageDraw.Draw(page)
    for (colour, text), (x, y) in zip(entries, places, strict=True):
        top = image.height + y
        if colour:
            draw.rectangle((x, top + 2, x + size - 2, top + size), fill=colour)
        draw.text((x + (1.4 * size if colour else 0), top), text, fill=INK, font=font)
    return page


def _enlarged(picture: Image.Image) -> Image.Image:
    """In colours, with a long side that words fit into."""
    longest = max(picture.size)
    factor = LEAST_SIDE / longest if longest < LEAST_SIDE else MOST_SIDE / longest if longest > MOST_SIDE else 1.0
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _font(image: Image.Image) -> Any:
    return ImageFont.load_default(size=max(13, round(max(image.size) / 42)))


def _readable(colour: Colour) -> Colour:
    """Ink or paper, whichever is told apart better from the colour behind it."""
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return INK if light > 140 else PAPER
