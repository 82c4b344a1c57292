"""What every drawn picture of the documentation has: shapes, a look, a legend.

A picture is a card with its own background that follows the reader's light or dark colour scheme.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

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

    def legend(self, y: float, note: str = "") -> float:
        """What the looks mean, and a note; how far it reaches to the right."""
        x = 22.0
        for look, words in (("frozen", "frozen"), ("used", "trained and saved")):
            self.box(x, y, 22, 16, "", look)
            self.text(x + 30, y + 13, words, "small", "start")
            x += 100
        if note:
            self.text(x + 52, y + 13, note, "small faint", "start")
            x += 52 + 6.2 * len(note)
        return x

    def save(self, file: Path) -> None:
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img"><title>{escape(self.title)}</title><style>{STYLE}</style>'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'markerUnits="userSpaceOnUse" orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
            f'<rect class="card" x=".5" y=".5" width="{self.width - 1}" height="{self.height - 1}" rx="8"/>\n'
        )
        file.write_text(svg + "\n".join(self.shapes) + "\n</svg>\n", encoding="utf-8")


def width_of(words: str, least: float = 44) -> float:
    """Of a box with these words in the small font."""
    return max(least, 6.5 * max(len(line) for line in words.split("\n")) + 16)


def spread(places: dict[str, str], known: dict[str, str], stems: tuple[str, str]) -> dict[str, str]:
    """`*.stream` stands for that place of both stems. KeyError for a place that is not known."""
    found = {}
    for place, words in places.items():
        stem, _, rest = place.partition(".")
        if place not in known and not (stem in stems and f"*.{rest}" in known):
            raise KeyError(f"no place {place!r} in such pictures; there are: {', '.join(known)}")
        found |= {f"{name}.{rest}": words for name in stems} if stem == "*" else {place: words}
    return found
