"""Pictures drawn by code: one coloured, textured shape each, such as a striped red star.

Names are made of three words, so that a model of images and texts can be asked for combinations that it has never
seen. A style says how things look beside that: `FLAT` is what the shipped CLIP was trained with, `CHALK` is what its
demonstration adapts it to. A quarter of all pairs of colour and shape, `HELD_OUT`, are in no picture of that training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 134, 28),
    "yellow": (242, 212, 44),
    "green": (48, 160, 70),
    "blue": (44, 84, 206),
    "purple": (132, 54, 176),
    "pink": (244, 142, 186),
    "brown": (124, 76, 38),
}
FINE = 4  # edges are drawn at this multiple of the size, then averaged
RGB = tuple[int, int, int]


# ------------------------------------------------------------------ shapes: closed outlines in -1..1, holes after them
def _regular(corners: int, radius: float = 1.0, inner: float | None = None, turn: float = 0.25) -> np.ndarray:
    """Corners on a circle, the first at the top; with `inner` a corner on a smaller circle between every two."""
    count = corners if inner is None else 2 * corners
    angles = 2 * np.pi * (np.arange(count) / count - turn)
    radii = np.full(count, radius)
    if inner is not None:
        radii[1::2] = inner
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2) / 17], 1)


def _crescent() -> np.ndarray:
    outer, inner = np.linspace(0.3, 1.7, 40) * np.pi, np.linspace(1.62, 0.38, 40) * np.pi
    edge = 0.95 * np.stack([np.cos(outer), np.sin(outer)], 1)
    bite = 0.72 * np.stack([np.cos(inner), np.sin(inner)], 1) + np.array([0.42, 0])
    return np.concatenate([edge, bite])


def _plus(half: float = 0.3, reach: float = 0.92) -> np.ndarray:
    a, b = half, reach
    return np.array(
        [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    )


def _arrow() -> np.ndarray:
    return np.array(
        [(0, -1), (0.85, -0.05), (0.32, -0.05), (0.32, 0.95), (-0.32, 0.95), (-0.32, -0.05), (-0.85, -0.05)]
    )


SHAPES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_regular(48, 0.88),),
    "square": (_regular(4, 1.1, turn=0.125),),
    "triangle": (_regular(3, 1.1) + np.array([0, 0.18]),),
    "star": (_regular(5, 1.08, 0.44),),
    "cross": (_plus(),),
    "ring": (_regular(48, 0.92), _regular(48, 0.5)),
    "heart": (_heart(),),
    "arrow": (_arrow(),),
    "hexagon": (_regular(6, 0.98),),
    "crescent": (_crescent(),),
}


# ------------------------------------------------------------------ textures: where the second colour is
def _nowhere(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.zeros(x.shape, bool)


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * (x + y) / 0.62) > 0


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cell = 0.52
    return np.hypot((x + 9.1) % cell - cell / 2, (y + 9.1) % cell - cell / 2) < 0.17


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.floor(x / 0.42) + np.floor(y / 0.42)) % 2 > 0


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _nowhere,
    "striped": _stripes,
    "dotted": _dots,
    "checkered": _checks,
}


@dataclass(frozen=True)
class Look:
    """What a picture shows. Raises ValueError for words that are not among TEXTURES, COLOURS and SHAPES."""

    texture: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        for word, known in ((self.texture, TEXTURES), (self.colour, COLOURS), (self.shape, SHAPES)):
            if word not in known:
                raise ValueError(f"{word!r} cannot be drawn: it is none of {', '.join(known)}")

    @property
    def name(self) -> str:
        """As a class name: "striped red star"."""
        return f"{self.texture} {self.colour} {self.shape}"


HELD_OUT = frozenset(
    (colour, shape) for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES) if (i + 3 * j) % 4 == 0
)


# ------------------------------------------------------------------ styles
@dataclass(frozen=True)
class Style:
    """How a look is drawn.

    ground: range of the background's brightness (0 to 255). tint: how far its channels differ. second: the colour that
    a texture mixes with the first, in the share `mixed`. radius: range, as a share of half the edge. shift: of the
    centre, alike. turn: largest rotation in degrees. shade: spread of the colour's brightness. strokes: range of the
    number of background lines. grain: standard deviation of noise, in 255ths. holes: share of the shape that the
    ground shows through, in specks.
    """

    ground: tuple[int, int]
    tint: int
    second: RGB
    mixed: float
    radius: tuple[float, float]
    shift: float
    turn: float
    shade: float
    strokes: tuple[int, int]
    grain: float
    holes: float


FLAT = Style(
    ground=(150, 255), tint=40, second=(255, 255, 255), mixed=0.8, radius=(0.5, 0.9), shift=0.12, turn=20.0,
    shade=0.15, strokes=(0, 0), grain=4.0, holes=0.0,
)  # fmt: skip
CHALK = Style(
    ground=(15, 70), tint=14, second=(20, 20, 20), mixed=0.7, radius=(0.42, 0.72), shift=0.25, turn=60.0,
    shade=0.3, strokes=(3, 8), grain=14.0, holes=0.3,
)  # fmt: skip


def draw(look: Look, style: Style, rng: np.random.RandomState, size: int = 48) -> np.ndarray:
    """A picture, uint8 (size, size, 3). rng: position, size, rotation, shades and noise come from it."""
    angle = np.deg2rad(rng.uniform(-style.turn, style.turn))
    radius = rng.uniform(*style.radius)
    centre = rng.uniform(-style.shift, style.shift, 2)
    cover = _cover(SHAPES[look.shape], angle, radius, centre, size)
    if style.holes:
        cover = cover * (_specks(rng, size) > style.holes)
    first = np.clip(np.array(COLOURS[look.colour]) * (1 + rng.uniform(-style.shade, style.shade)), 0, 255)
    second = (1 - style.mixed) * first + style.mixed * np.array(style.second)
    u, v = _own_coordinates(angle, radius, centre, size)
    marks = TEXTURES[look.texture](u, v).astype(np.float64)
    marks = marks.reshape(size, FINE, size, FINE).mean((1, 3))[..., None]
    paint = first * (1 - marks) + second * marks
    picture = _ground(style, rng, size) * (1 - cover[..., None]) + paint * cover[..., None]
    return np.clip(picture + rng.normal(0, style.grain, picture.shape), 0, 255).round().astype(np.uint8)


def draw_all(looks: Sequence[Look], style: Style, seed: int, size: int = 48) -> np.ndarray:
    """One picture of each look, uint8 (N, size, size, 3); the same for the same seed on every machine."""
    rng = np.random.RandomState(seed)
    return np.stack([draw(look, style, rng, size) for look in looks])


# ------------------------------------------------------------------ details
def _cover(outlines: Sequence[np.ndarray], angle: float, radius: float, centre: np.ndarray, size: int) -> np.ndarray:
    """Share of every pixel that lies inside the first outline and outside the others, (size, size) in 0..1."""
    turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    canvas = Image.new("L", (size * FINE, size * FINE), 0)
    pen = ImageDraw.Draw(canvas)
    for i, outline in enumerate(outlines):
        points = ((outline @ turned) * radius + centre + 1) / 2 * size * FINE
        pen.polygon([tuple(point) for point in points.tolist()], fill=255 if i == 0 else 0)
    return np.asarray(canvas, np.float64).reshape(size, FINE, size, FINE).mean((1, 3)) / 255


def _own_coordinates(angle: float, radius: float, centre: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the fine pixels in the frame of the shape, where its outline was given."""
    line = (np.arange(size * FINE) + 0.5) / (size * FINE) * 2 - 1
    x, y = (line[None, :] - centre[0]) / radius, (line[:, None] - centre[1]) / radius
    return x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)


def _ground(style: Style, rng: np.random.RandomState, size: int) -> np.ndarray:
    """The background (size, size, 3): one colour, and lines of a similar brightness across it."""
    colour = rng.uniform(*style.ground) + rng.uniform(-style.tint, style.tint, 3)
    count = rng.randint(style.strokes[0], style.strokes[1] + 1)
    canvas = Image.new("RGB", (size, size), _as_rgb(colour))
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        ends = rng.uniform(0, size, 4).tolist()
        pen.line(ends, fill=_as_rgb(colour + rng.uniform(20, 90)), width=int(rng.randint(1, 3)))
    return np.asarray(canvas, np.float64)


def _as_rgb(colour: np.ndarray) -> RGB:
    red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
    return red, green, blue


def _specks(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Noise in 0..1 that is smooth over about two pixels, uniform in its ranks."""
    noise = rng.normal(size=(size + 1, size + 1))
    smooth = noise[:-1, :-1] + noise[1:, :-1] + noise[:-1, 1:] + noise[1:, 1:]
    ranks = np.empty(size * size)
    ranks[np.argsort(smooth, axis=None)] = np.arange(size * size) / (size * size)
    return ranks.reshape(size, size)
