"""Draw the SVG pictures of the documentation: python docs/images/draw.py

Every picture is a card with its own background that follows the reader's light or dark colour scheme.
"""

from __future__ import annotations

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
    ("cli", "one file per command", "demo train evaluate predict inspect list bench", "upper"),
    ("deploy", "export, serving, adapter banks", "planned", "planned"),
    ("studies", "comparisons, reports, benchmarks", "report plots results benchmarks recipes", "upper"),
    ("training", "the runner, on Lightning", "runner settings optim schedule loaders", "upper"),
    ("tasks", "model + loss + metrics + decoding", "classification", "upper"),
    ("data", "one file per format", "image_folder arrays digits splits transforms", "upper"),
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
def method(name: str, title: str, used: set[str]) -> None:
    """A block and the head from left to right, with what the method adds or trains."""
    picture = Picture(760, 236, title)
    line, top = 166.0, 72.0
    look = lambda part: "used" if part in used else "frozen"  # noqa: E731
    picture.text(22, line + 5, "x", "title")
    x = 32.0
    if "shallow" in used:
        picture.line((x, line), (x + 16, line), look="line stream")
        picture.box(x + 16, line - 13, 66, 26, "prompts", "used", "small")
        picture.text(x + 49, line + 32, "before block 0", "small faint")
        x += 82
    for body in ("attention", "MLP"):
        split, norm = x + 14, x + 26
        wide, added = norm + 52, norm + 52 + 100
        picture.line((x, line), (added + 22, line), look="line stream", tip=False)
        picture.dot(split, line)
        picture.line((split, line), (split, top), (norm, top))
        picture.box(norm, top - 14, 42, 28, "norm", look("norm"))
        picture.line((norm + 42, top), (wide, top))
        picture.box(wide, top - 22, 86, 44, body, look(body))
        picture.line((wide + 86, top), (added + 22, top), (added + 22, line - 10))
        picture.sum(added + 22, line)
        if body == "attention" and "prompts" in used:
            picture.box(wide - 8, 10, 102, 22, "prompts' K, V", "used", "small")
            picture.line((wide + 43, 32), (wide + 43, top - 23))
        if body == "attention" and "lora" in used:
            picture.box(wide - 6, top + 38, 98, 24, "B A on q, v", "used", "small")
            picture.line((wide + 43, top + 38), (wide + 43, top + 23))
        if "bias" in used:
            for spot, y in ((norm + 21, top + 28), (wide + 43, top + 36)):
                picture.box(spot - 15, y - 10, 30, 19, "+ b", "used", "small")
        x = added + 31
        if "stream" in used:
            picture.line((x, line), (x + 14, line), look="line stream")
            picture.box(x + 14, line - 15, 58, 30, "Mona", "used")
            x += 72
    picture.line((x, line), (x + 34, line), look="line stream")
    picture.text(x + 17, line - 10, "...", "faint")
    picture.box(x + 34, line - 18, 56, 36, "head", "used")
    legend = 22.0
    for kind, words in (("frozen", "frozen"), ("used", "trained and saved")):
        picture.box(legend, 210, 22, 16, "", kind)
        picture.text(legend + 30, 223, words, "small", "start")
        legend += 100
    picture.width = int(max(x + 34 + 56 + 22, 420))
    picture.save(f"method-{name}.svg")


def draw_all() -> None:
    """Write every picture to FOLDER."""
    architecture()
    slots()
    method("full", "Full fine-tuning trains the whole block and the head", {"norm", "attention", "MLP"})
    method("linear", "Linear probing trains the head only", set())
    method("bitfit", "BitFit trains the biases and the head", {"bias"})
    method("lora", "LoRA trains low-rank changes of linear layers and the head", {"lora"})
    method("vpt", "VPT-deep trains prompts that act as keys and values, and the head", {"prompts"})
    method("vpt-shallow", "VPT-shallow trains prompts that enter before the first block, and the head", {"shallow"})
    method("mona", "Mona trains layers on the stream, and the head", {"stream"})


if __name__ == "__main__":
    draw_all()
