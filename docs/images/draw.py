"""Draw the SVG pictures of the documentation: python docs/images/draw.py

Every picture is a card with its own background that follows the reader's light or dark colour scheme.
"""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.small { font-size: 11.5px; } .title { font-weight: 600; font-size: 14px; } .faint { fill: #59636e; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.frozen { fill: #eaeef2; stroke: #818b98; } .slot { fill: #fff8e8; stroke: #bf7b1d; stroke-dasharray: 4 3; }
.used { fill: #ffdfb0; stroke: #b35900; stroke-width: 1.6; } .core { fill: #e3eefc; stroke: #4a7ebb; }
.room { fill: #ffffff; stroke: #b6c2cf; } .blue .room { stroke: #9dbde3; } .planned { opacity: .55; }
.line { fill: none; stroke: #59636e; stroke-width: 1.4; } .stream { stroke-width: 2.4; }
.tip { fill: #59636e; } .sum { fill: #ffffff; stroke: #59636e; stroke-width: 1.4; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .faint { fill: #9aa6b2; } .card { fill: #151a20; stroke: #39424d; }
.frozen { fill: #262e38; stroke: #75808d; } .slot { fill: #2b2213; stroke: #d69a3e; }
.used { fill: #5c3a0c; stroke: #f0a94a; } .core { fill: #16263b; stroke: #5b8fcc; }
.room { fill: #1d242c; stroke: #48535f; } .blue .room { stroke: #3d6596; }
.line { stroke: #9aa6b2; } .tip { fill: #9aa6b2; } .sum { fill: #151a20; stroke: #9aa6b2; }
}"""


class Picture:
    """Collects shapes; `save` writes them as one SVG file."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, look: str = "", anchor: str = "middle") -> None:
        self.shapes.append(f'<text class="{look}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(
        self, x: float, y: float, w: float, h: float, words: str = "", look: str = "frozen", font: str = ""
    ) -> None:
        self.shapes.append(f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5"/>')
        lines = words.split("\n") if words else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4.5 + 15 * (i - (len(lines) - 1) / 2), line, font)

    def line(self, *points: tuple[float, float], tip: bool = True, look: str = "line") -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        marker = ' marker-end="url(#tip)"' if tip else ""
        self.shapes.append(f'<path class="{look}" d="{path}"{marker}/>')

    def sum(self, x: float, y: float) -> None:
        """A circled plus."""
        self.shapes.append(f'<circle class="sum" cx="{x:g}" cy="{y:g}" r="9"/>')
        self.line((x - 5, y), (x + 5, y), tip=False)
        self.line((x, y - 5), (x, y + 5), tip=False)

    def dot(self, x: float, y: float) -> None:
        self.shapes.append(f'<circle class="tip" cx="{x:g}" cy="{y:g}" r="3.2"/>')

    def save(self, name: str) -> None:
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img"><title>{escape(self.title)}</title><style>{STYLE}</style>'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'markerUnits="userSpaceOnUse" orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
            f'<rect class="card" x=".5" y=".5" width="{self.width - 1}" height="{self.height - 1}" rx="8"/>\n'
        )
        (FOLDER / name).write_text(svg + "\n".join(self.shapes) + "\n</svg>\n", encoding="utf-8")


# ------------------------------------------------------------------ rooms and floors
FLOORS = [  # from the top of the house down
    ("cli", "one file per command", "demo train tune compare predict analyze bench", "upper"),
    ("deploy", "export, serving, adapter banks", "planned", "planned"),
    ("studies", "comparisons, reports, analyses, benchmarks", "study grid trial report plots recipes", "upper"),
    ("training", "the runner, on Lightning", "runner settings optim schedule loaders", "upper"),
    ("tasks", "model + loss + metrics + decoding", "classification multilabel", "upper"),
    ("data", "one file per format", "image_folder csv_table vtab1k fgvc splits", "upper"),
    ("lifecycle", "attach, switch, save, load, merge", "attach switch files merge count official peft_format", "core"),
    ("methods", "one file per method", "full linear bitfit lora vpt mona", "core"),
    ("backbones", "one file per family of blocks", "vit swin convnext unknown names shipped", "core"),
    ("sites", "slots, layouts, class swapping", "equation slots layout swap anatomy weights", "core"),
    ("models", "networks that no library has", "planned", "planned"),
]


def architecture() -> None:
    picture = Picture(
        820, 18 + 52 * len(FLOORS) + 30, "The floors of deltalens and the rooms on them; imports go down only"
    )
    top = 18
    for i, (name, purpose, rooms, kind) in enumerate(FLOORS):
        y = top + 52 * i
        group = {"core": "core", "planned": "frozen planned", "upper": "frozen"}[kind]
        picture.shapes.append(f'<g class="{"blue" if kind == "core" else ""}">')
        picture.box(40, y, 764, 46, "", group)
        picture.text(52, y + 20, name, "mono title", "start")
        picture.text(52, y + 37, purpose, "small faint", "start")
        x = 792.0
        for room in reversed(rooms.split()):
            width = 7.2 * len(room) + 14
            x -= width
            if room == "planned":
                picture.text(x + width / 2, y + 28, room, "small faint")
            else:
                picture.box(x, y + 11, width, 24, room, "room", "mono small")
            x -= 6
        picture.shapes.append("</g>")
    bottom = top + 52 * len(FLOORS)
    picture.line((28, top + 4), (28, bottom - 8))
    picture.shapes.append(
        f'<text class="small faint" x="20" y="{(top + bottom) / 2:g}" text-anchor="middle" '
        f'transform="rotate(-90 20 {(top + bottom) / 2:g})">a file imports from lower floors only</text>'
    )
    picture.text(52, bottom + 16, "blue: the core, which imports torch and timm only", "small faint", "start")
    picture.save("architecture.svg")


# ------------------------------------------------------------------ a block with all its slots
SIDE_SLOTS = {  # slots that belong to a branch's body
    "attention": ("attention.prompts", "attention.mask", "weights:q, k, v", "weights:proj"),
    "mlp": ("weights:fc1", "weights:fc2"),
}


def slots() -> None:
    picture = Picture(760, 0, "A transformer block with every slot that a method may use")
    stream, branch, side = 280.0, 490.0, 130.0

    def slot(x: float, y: float, name: str, width: float = 150) -> None:
        picture.box(x - width / 2, y - 13, width, 26, name, "slot", "mono small")

    picture.text(stream, 24, "x", "title")
    picture.line((stream, 30), (stream, 44), look="line stream")
    slot(stream, 58, "tokens.in")
    y = 58.0
    for name, body in (("attention", "attention"), ("mlp", "MLP")):
        beside = SIDE_SLOTS[name]
        height = 28 * len(beside)
        top = y + (46 if name == "attention" else 30)
        join = top + 164 + height
        picture.line((stream, y + 13), (stream, join - 10), look="line stream")
        picture.dot(stream, top)
        picture.line((stream, top), (branch, top), (branch, top + 14))
        picture.box(branch - 40, top + 14, 80, 24, "norm", "frozen")
        picture.line((branch, top + 38), (branch, top + 62))
        picture.text(branch + 10, top + 54, "n", "small faint", "start")
        slot(branch, top + 75, f"{name}.pre")
        picture.line((branch, top + 88), (branch, top + 102))
        picture.box(branch - 75, top + 102, 150, height, f"{body}\nx LayerScale", "frozen")
        for i, words in enumerate(beside):
            middle = top + 116 + 28 * i
            picture.box(branch + 102, middle - 12, 152, 24, words, "slot", "mono small")
            picture.line((branch + 102, middle), (branch + 76, middle))
        picture.line((branch, top + 102 + height), (branch, top + 116 + height))
        slot(branch, top + 129 + height, f"{name}.inner")
        picture.line((branch, top + 142 + height), (branch, join), (stream + 10, join))
        picture.text(branch - 20, join - 7, "drop path", "small faint", "end")
        middle = (top + join) / 2
        picture.line((stream, top), (side, top), (side, middle - 14))
        picture.text(side + 8, top + 18, "x and n", "small faint", "start")
        slot(side, middle, f"{name}.parallel")
        picture.line((side, middle + 13), (side, join), (stream - 10, join))
        picture.sum(stream, join)
        picture.line((stream, join + 9), (stream, join + 22), look="line stream")
        slot(stream, join + 36, f"{name}.stream")
        y = join + 36
    join = y + 50
    picture.line((stream, y + 13), (stream, join - 10), look="line stream")
    picture.dot(stream, 84)
    picture.line((stream, 84), (28, 84), (28, join), (54, join))
    slot(side, join, "block.parallel")
    picture.line((side + 75, join), (stream - 10, join))
    picture.text(36, join + 32, "x of the block and", "small faint", "start")
    picture.text(36, join + 47, "n of its first norm", "small faint", "start")
    picture.sum(stream, join)
    picture.line((stream, join + 9), (stream, join + 22), look="line stream")
    slot(stream, join + 36, "block.stream")
    picture.line((stream, join + 49), (stream, join + 62), look="line stream")
    slot(stream, join + 76, "tokens.out")
    picture.line((stream, join + 89), (stream, join + 106), look="line stream")
    picture.text(stream, join + 122, "y", "title")
    for i, (look, words) in enumerate(
        (("frozen", "the frozen block"), ("slot", "a slot: empty, or one or more modules"))
    ):
        picture.box(436, join + 8 + 30 * i, 24, 18, "", look)
        picture.text(470, join + 21 + 30 * i, words, "small", "start")
    picture.height = int(join + 138)
    picture.save("slots.svg")


# ------------------------------------------------------------------ what one method uses
PLACES = {  # place -> what a picture shows there; its words go into the box
    "pixels": "a box before the patch embedding",
    "patch embedding": "the patch embedding, with its own words",
    "tokens": "a box on the stream before the block",
    "tokens note": "words under it",
    "*.norm": "the norm, with its own word",
    "*.pre": "a box between norm and branch",
    "*.body": "attention or MLP themselves, with their own words",
    "*.prompts": "a box over the branch",
    "*.weights": "a box under the branch",
    "*.each": "a badge under norm and branch",
    "*.inner": "a box behind the branch, before the sum",
    "*.parallel": "a box beside the branch that reads the stream",
    "*.parallel of n": "a box beside the branch that reads what the norm gives",
    "*.stream": "a box on the stream behind the sum",
    "block.parallel": "a box beside the whole block",
    "block.stream": "a box on the stream behind the block",
    "final norm": "a box before the head",
    "pool": "a box before the head",
    "beside": "a box that reads the image and leads to `output`",
    "output": "a box right before the head",
    "head": "the words of the head",
    "note": "words in the legend, such as which blocks are meant",
}
BRANCHES = ("attention", "mlp")


def width_of(words: str, least: float = 44) -> float:
    """Of a box with these words in the small font."""
    return max(least, 6.5 * max(len(line) for line in words.split("\n")) + 16)


def spread(places: dict[str, str]) -> dict[str, str]:
    """`*.stream` stands for `attention.stream` and `mlp.stream`. KeyError for a place that pictures do not have."""
    found = {}
    for place, words in places.items():
        branch, _, rest = place.partition(".")
        if place not in PLACES and not (branch in BRANCHES and f"*.{rest}" in PLACES):
            raise KeyError(f"no place {place!r} in pictures of methods; there are: {', '.join(PLACES)}")
        found |= {f"{name}.{rest}": words for name in BRANCHES} if branch == "*" else {place: words}
    return found


class MethodPicture(Picture):
    """A block and the head from left to right; `x` is how far the stream has come."""

    stream, top = 166.0, 72.0  # heights of the stream and of the branches

    def __init__(self, title: str, places: dict[str, str]):
        super().__init__(760, 236, title)
        self.places, self.x, self.lowest = spread(places), 32.0, self.stream

    def on_stream(self, place: str) -> None:
        """A box on the stream, where the place is used."""
        if place in self.places:
            width = width_of(self.places[place])
            self.line_to(14)
            self.box(self.x, self.stream - 15, width, 30, self.places[place], "used", "small")
            self.x += width

    def line_to(self, length: float, tip: bool = True) -> None:
        self.line((self.x, self.stream), (self.x + length, self.stream), look="line stream", tip=tip)
        self.x += length

    def fixed(self, place: str, x: float, y: float, width: float, height: float, words: str) -> None:
        """A part of the frozen block, marked where it is trained itself."""
        used = place in self.places
        self.box(x, y - height / 2, width, height, self.places.get(place) or words, "used" if used else "frozen")

    def beside(self, place: str, start: float, end: float, depth: float) -> None:
        """A box under the stream, from what it reads at `start` to the sum at `end`."""
        if place not in self.places:
            return
        words = self.places[place]
        y, width = self.stream + depth, width_of(words)
        middle = (start + end) / 2
        self.line((start, self.stream), (start, y), (middle - width / 2, y))
        self.box(middle - width / 2, y - 13, width, 26, words, "used", "small")
        self.line((middle + width / 2, y), (end, y), (end, self.stream + 10))
        self.lowest = max(self.lowest, y + 13)

    def branch(self, name: str, words: str) -> None:
        """norm, pre, body, inner, sum; with what hangs on them."""
        line, top, at, start = self.stream, self.top, lambda place: f"{name}.{place}", self.x
        split, norm = start + 14, start + 26
        self.dot(split, line)
        self.line((split, line), (split, top), (norm, top))
        self.fixed(at("norm"), norm, top, 42, 28, "norm")
        x = norm + 42
        for place in ("pre", "body", "inner"):
            if place == "body":
                self.line((x, top), (x + 10, top))
                body = x + 10
                self.fixed(at("body"), body, top, 86, 44, words)
                x = body + 86
            elif at(place) in self.places:
                width = width_of(self.places[at(place)])
                self.line((x, top), (x + 12, top))
                self.box(x + 12, top - 15, width, 30, self.places[at(place)], "used", "small")
                x += 12 + width
        total = x + 36
        self.line((x, top), (total, top), (total, line - 10))
        self.sum(total, line)
        if at("prompts") in self.places:
            width = width_of(self.places[at("prompts")])
            self.box(body + 43 - width / 2, 10, width, 22, self.places[at("prompts")], "used", "small")
            self.line((body + 43, 32), (body + 43, top - 23))
        if at("weights") in self.places:
            width = width_of(self.places[at("weights")])
            self.box(body + 43 - width / 2, top + 38, width, 24, self.places[at("weights")], "used", "small")
            self.line((body + 43, top + 38), (body + 43, top + 23))
        if at("each") in self.places:
            width = width_of(self.places[at("each")], 30) - 6
            for spot, y in ((norm + 21, top + 28), (body + 43, top + 36)):
                self.box(spot - width / 2, y - 10, width, 19, self.places[at("each")], "used", "small")
        if at("parallel of n") in self.places:
            width, y = width_of(self.places[at("parallel of n")]), top + 52
            self.dot(norm + 47, top)
            self.line((norm + 47, top), (norm + 47, y), (body + 43 - width / 2, y))
            self.box(body + 43 - width / 2, y - 13, width, 26, self.places[at("parallel of n")], "used", "small")
            self.line((body + 43 + width / 2, y), (total - 22, y), (total - 22, line - 22), (total - 7, line - 7))
        self.beside(at("parallel"), split, total, 44)
        self.line((start, line), (total - 9, line), look="line stream", tip=False)
        self.x = total + 9
        self.on_stream(at("stream"))

    def draw(self) -> None:
        line, places = self.stream, self.places
        image = 62.0
        if {"pixels", "beside", "patch embedding"} & places.keys():
            self.text(30, line + 5, "image", "title")
            self.x = 54
            self.on_stream("pixels")
            self.line_to(20)
            self.fixed("patch embedding", self.x, line, 84, 40, "patch\nembedding")
            self.x += 84
        else:
            self.text(22, line + 5, "x", "title")
        before = self.x
        self.on_stream("tokens")
        if "tokens note" in places:
            self.text((before + 14 + self.x) / 2, line + 32, places["tokens note"], "small faint")
        start = self.x
        self.branch("attention", "attention")
        self.branch("mlp", "MLP")
        if "block.parallel" in places:
            deep = 44 if self.lowest == line else 84
            self.dot(start + 6, line)
            self.line_to(20, tip=False)
            self.sum(self.x, line)
            self.beside("block.parallel", start + 6, self.x, deep)
            self.x += 9
        self.on_stream("block.stream")
        self.line_to(34)
        self.text(self.x - 17, line - 10, "...", "faint")
        behind = [place for place in ("final norm", "pool", "output") if place in places]
        self.x -= 14 if behind else 0  # the first of them ends the dotted piece
        for place in behind:
            self.on_stream(place)
        if "beside" in places:
            middle, width = (image + self.x) / 2, width_of(places["beside"])
            end, y = self.x - width_of(places["output"]) / 2, line + 44
            self.dot(image, line)
            self.line((image, line), (image, y), (middle - width / 2, y))
            self.box(middle - width / 2, y - 13, width, 26, places["beside"], "used", "small")
            self.line((middle + width / 2, y), (end, y), (end, line + 16))
            self.lowest = y + 13
        if behind:
            self.line_to(14)
        head = places.get("head", "head")
        width = max(56, 1.2 * width_of(head))
        self.box(self.x, line - 18, width, 36, head, "used")
        self.x += width
        self.legend()

    def legend(self) -> None:
        x, y = 22.0, max(210.0, self.lowest + 14)
        for kind, words in (("frozen", "frozen"), ("used", "trained and saved")):
            self.box(x, y, 22, 16, "", kind)
            self.text(x + 30, y + 13, words, "small", "start")
            x += 100
        if "note" in self.places:
            self.text(x + 52, y + 13, self.places["note"], "small faint", "start")
            x += 52 + 6.2 * len(self.places["note"])
        self.width, self.height = int(max(self.x + 22, x + 10, 420)), int(y + 26)


# ------------------------------------------------------------------ what a method of two towers uses
TOWER_PLACES = {  # place -> what a picture shows there; its words go into the box
    "words": "the box where texts enter, with its own words",
    "*.tokens": "a box on the stream behind the embedding",
    "*.lower": "a box on the inner side of the lower blocks",
    "*.upper": "a box beside the upper blocks, from before them to a sum behind",
    "*.weights": "a box on the inner side of either blocks",
    "*.output": "a box on the features",
    "shared": "a box between the two of `*.upper`",
    "couples": "words at an arrow from what the text tower has to the image tower's, lower and tokens",
    "meta": "a box that reads the image features and leads to the words",
    "logits": "a box behind the cosines",
    "loss": "a box that reads the logits",
    "note": "words in the legend",
}
TOWERS = ("text", "image")


class TowersPicture(Picture):
    """Two towers from left to right, texts above and images below, and their cosines."""

    rows = {"text": 50.0, "image": 222.0}
    middle = 136.0

    def __init__(self, title: str, places: dict[str, str]):
        super().__init__(806, 300, title)
        self.places: dict[str, str] = {}
        for place, words in places.items():
            tower, _, rest = place.partition(".")
            if place not in TOWER_PLACES and not (tower in TOWERS and f"*.{rest}" in TOWER_PLACES):
                known = ", ".join(TOWER_PLACES)
                raise KeyError(f"no place {place!r} in pictures of two towers; there are: {known}")
            self.places |= {f"{name}.{rest}": words for name in TOWERS} if tower == "*" else {place: words}

    def used(self, place: str, x: float, y: float, height: float = 26) -> tuple[float, float]:
        """A box centred there, with the words of the place; (its left, its right)."""
        width = width_of(self.places[place])
        self.box(x - width / 2, y - height / 2, width, height, self.places[place], "used", "small")
        return x - width / 2, x + width / 2

    def inner(self, tower: str, distance: float) -> float:
        """The height so far from a tower's stream towards the other tower."""
        return self.rows[tower] + (distance if tower == "text" else -distance)

    def tower(self, name: str) -> None:
        y, places = self.rows[name], self.places
        self.text(16, y + 5, name, "title", "start")
        self.line((66, y), (82, y))
        words, look = ("a photo of\na {name}.", "frozen") if name == "text" else ("patch\nembedding", "frozen")
        if name == "text" and "words" in places:
            words, look = places["words"], "used"
        self.box(82, y - 21, 110, 42, words, look, "small")
        x = 192.0
        if f"{name}.tokens" in places:
            left, right = self.used(f"{name}.tokens", 252, y, 30)
            self.line((x, y), (left, y), look="line stream")
            x = right
        self.line((x, y), (314, y), look="line stream")
        self.box(314, y - 21, 92, 42, "lower blocks", "frozen", "small")
        self.line((406, y), (446, y), look="line stream")
        self.box(446, y - 21, 92, 42, "upper blocks", "frozen", "small")
        for blocks, at in (("lower", 360), ("upper", 492)):
            if f"{name}.weights" in places:
                self.used(f"{name}.weights", at, self.inner(name, 48))
                self.line((at, self.inner(name, 35)), (at, self.inner(name, 22)))
            elif blocks == "lower" and f"{name}.lower" in places:
                self.used(f"{name}.lower", at, self.inner(name, 48))
                self.line((at, self.inner(name, 35)), (at, self.inner(name, 22)))
        x = 538.0
        if f"{name}.upper" in places:
            beside = self.inner(name, 44)
            left, right = self.used(f"{name}.upper", 492, beside)
            self.dot(426, y)
            self.line((426, y), (426, beside), (left, beside))
            self.line((right, beside), (562, beside), (562, self.inner(name, 10)))
            self.line((x, y), (553, y), look="line stream", tip=False)
            self.sum(562, y)
            x = 571.0
        if f"{name}.output" in places:
            left, right = self.used(f"{name}.output", 622, y, 30)
            self.line((x, y), (left, y), look="line stream")
            x = right
        self.line((x, y), (688, y), (688, self.middle - (18 if name == "text" else -18)), look="line stream")

    def draw(self) -> None:
        places, middle = self.places, self.middle
        for name in TOWERS:
            self.tower(name)
        self.box(658, middle - 18, 60, 36, "cosines", "frozen", "small")
        x = 718.0
        if "logits" in places:
            left, right = self.used("logits", x + 20 + width_of(places["logits"]) / 2, middle, 30)
            self.line((x, middle), (left, middle), look="line stream")
            x = right
        self.line((x, middle), (x + 22, middle), look="line stream")
        self.text(x + 27, middle + 5, "logits", "title", "start")
        self.width = int(max(self.width, x + 86))
        if "loss" in places:
            self.used("loss", 600, middle)
            self.line((600 + width_of(places["loss"]) / 2, middle), (656, middle), tip=False)
        if "shared" in places:
            self.used("shared", 492, middle)
            for name in TOWERS:
                self.line((492, middle - (13 if name == "text" else -13)), (492, self.inner(name, 57)))
        if "couples" in places:
            self.line((137, self.rows["text"] + 21), (137, middle), (252, middle), (252, self.rows["image"] - 15))
            self.line((360, self.inner("text", 61)), (360, self.inner("image", 61)))
            for at in (258, 366):
                self.text(at, middle + 18, places["couples"], "small faint", "start")
        if "meta" in places:
            y = self.rows["image"]
            self.dot(600, y)
            left, right = self.used("meta", 366, middle)
            self.line((600, y), (600, middle), (right, middle))
            self.line((left, middle), (137, middle), (137, self.rows["text"] + 21))
        self.legend()

    def legend(self) -> None:
        x, y = 22.0, 268.0
        for kind, words in (("frozen", "frozen"), ("used", "trained and saved")):
            self.box(x, y, 22, 16, "", kind)
            self.text(x + 30, y + 13, words, "small", "start")
            x += 100
        if "note" in self.places:
            self.text(x + 52, y + 13, self.places["note"], "small faint", "start")


def draw_all() -> None:
    """Write every picture to FOLDER; those of the methods are described in methods.json, one line each."""
    architecture()
    slots()
    described = json.loads((Path(__file__).parent / "methods.json").read_text(encoding="utf-8"))
    for name, (title, places, *towers) in described.items():
        picture = (TowersPicture if towers else MethodPicture)(title, places)
        picture.draw()
        picture.save(f"method-{name}.svg")


if __name__ == "__main__":
    draw_all()
