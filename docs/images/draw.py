"""Draw the SVG pictures of the documentation: python docs/images/draw.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from picture import Picture, spread, width_of  # noqa: E402
from towers import TowersPicture  # noqa: E402

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
    picture.save(FOLDER / "architecture.svg")


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
    picture.save(FOLDER / "slots.svg")


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


class MethodPicture(Picture):
    """A block and the head from left to right; `x` is how far the stream has come."""

    stream, top = 166.0, 72.0  # heights of the stream and of the branches

    def __init__(self, title: str, places: dict[str, str]):
        super().__init__(760, 236, title)
        self.places, self.x, self.lowest = spread(places, PLACES, BRANCHES), 32.0, self.stream

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
            width, y = width_of(self.places[at("parallel of n")]), top + (68 if at("each") in self.places else 52)
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
        self.end()

    def end(self) -> None:
        y = max(210.0, self.lowest + 14)
        x = self.legend(y, self.places.get("note", ""))
        self.width, self.height = int(max(self.x + 22, x + 10, 420)), int(y + 26)


def draw_all() -> None:
    """Write every picture to FOLDER; those of the methods are described in methods.json, one line each."""
    architecture()
    slots()
    described = json.loads((Path(__file__).parent / "methods.json").read_text(encoding="utf-8"))
    for name, (title, places, *towers) in described.items():
        picture = (TowersPicture if towers else MethodPicture)(title, places)
        picture.draw()
        picture.save(FOLDER / f"method-{name}.svg")


if __name__ == "__main__":
    draw_all()
