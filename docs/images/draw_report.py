"""Draws demo-report.png and demo-table.png from a demo's report.html, in the page's own layout and light colours.

deltalens demo && python docs/images/draw_report.py deltalens-demo/report.html

It needs rsvg-convert (librsvg) instead of a browser. Every word, number, plot and picture is read from the page.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html import escape, unescape
from pathlib import Path

from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageFont

from deltalens.studies.figure import page_colours
from deltalens.studies.study_plots import standalone

FOLDER = Path(__file__).parent
WIDTH, LEFT, RIGHT = 1100, 54, 1046
FONT = "DejaVu Sans"
LIGHT = page_colours()


@cache
def font(size: float, bold: bool) -> ImageFont.FreeTypeFont:
    file = findfont(FontProperties(family=FONT, weight="bold" if bold else "normal"))
    return ImageFont.truetype(file, round(20 * size))


def width_of(text: str, size: float, bold: bool = False) -> float:
    return font(size, bold).getlength(text) / 20


def plain(html: str) -> str:
    """HTML as text."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


class Sheet:
    """A page that grows downwards; `y` is how far it has come."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 56.0

    def text(self, x: float, y: float, words: str, size: float, colour: str, bold: bool = False, end: bool = False):
        """One line; y: its baseline. end: x is where it ends."""
        anchor = ' text-anchor="end"' if end else ""
        style = f"font: {'bold ' if bold else ''}{size:g}px {FONT}; fill: {colour}"  # over the rules of the plots
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" style="{style}"{anchor}>{escape(words)}</text>')

    def paragraph(self, words: str, size: float, line: float, colour: str, digits: int) -> None:
        """Words in lines of at most so many digits."""
        most, row = digits * width_of("0", size), ""
        for word in [*words.split(" "), None]:
            longer = f"{row} {word}".strip()
            if word is None or width_of(longer, size) > most:
                self.text(LEFT, self.y + (line + 0.7 * size) / 2, row, size, colour)
                self.y, row = self.y + line, word or ""
            else:
                row = longer

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, more: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" {more}/>'
        )

    def card(self, x: float, y: float, width: float, height: float) -> None:
        self.rectangle(x, y, width, height, LIGHT["card"], f'stroke="{LIGHT["line"]}" rx="12"')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')

    def heading(self, words: str) -> None:
        self.y += 52
        self.text(LEFT, self.y + 19, words, 19, LIGHT["ink"], bold=True)
        self.y += 31

    def save(self, name: str, height: float) -> None:
        """The page so far as a picture."""
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{WIDTH}" '
            f'height="{round(height)}">\n<rect width="100%" height="100%" fill="{LIGHT["page"]}"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>"
        )
        file = FOLDER / name
        subprocess.run(["rsvg-convert", "-o", str(file), "/dev/stdin"], input=svg.encode(), check=True)
        Image.open(file).convert("RGB").save(file, optimize=True)


# ------------------------------------------------------------------ the parts of the page
def head(sheet: Sheet, page: str) -> None:
    part = re.search(r"<header>(.*?)</header>", page, re.DOTALL)[1]
    sheet.text(LEFT, sheet.y - 3, plain(re.search(r"<h1>(.*?)</h1>", part)[1]), 30, LIGHT["ink"], bold=True)
    sheet.y += 22
    for words in re.findall(r"<p>(.*?)</p>", part):
        sheet.paragraph(plain(words), 16, 25.6, LIGHT["ink"], 70)
        sheet.y += 12


def section(sheet: Sheet, page: str, title: str) -> str:
    """The heading and the note of a section; the section."""
    part = next(each for each in re.findall(r"<section>.*?</section>", page, re.DOTALL) if f"<h2>{title}</h2>" in each)
    sheet.heading(title)
    for words in re.findall(r'<p class="note">(.*?)</p>', part):
        sheet.paragraph(plain(words), 14, 21.7, LIGHT["soft"], 92)
        sheet.y += 16
    return part


def table(sheet: Sheet, page: str) -> None:
    part = section(sheet, page, "Results")
    header = [plain(cell) for cell in re.findall(r"<th>(.*?)</th>", part)]
    rows = re.findall(
        r'<tr class="(c\d)"><td><span class="method">(.*?)</span><span class="settings">(.*?)</span>(.*?)</tr>', part
    )
    cells = [[plain(cell) for cell in re.findall(r"<td.*?</td>", rest)] for *_, rest in rows]
    bars = [float(re.search(r"width:([\d.]+)%", rest)[1]) for *_, rest in rows]
    wide = [max(width_of(settings, 13) + 19 for _, _, settings, _ in rows)]
    wide += [
        18 + max(width_of(name, 13), *(width_of(row[column], 15, column == 0) for row in cells))
        for column, name in enumerate(header[1:])
    ]
    spare = (RIGHT - LEFT - sum(wide)) / sum(wide)
    edges = [LEFT + (1 + spare) * sum(wide[: column + 1]) for column in range(len(wide))]
    sheet.text(LEFT, sheet.y + 21, header[0], 13, LIGHT["soft"])
    for edge, name in zip(edges[1:], header[1:], strict=True):
        sheet.text(edge, sheet.y + 21, name, 13, LIGHT["soft"], end=True)
    sheet.y += 33.5
    for (kind, name, settings, _), values, share in zip(rows, cells, bars, strict=True):
        sheet.rectangle(LEFT, sheet.y, RIGHT - LEFT, 1, LIGHT["line"])
        sheet.dot(LEFT + 5, sheet.y + 24, LIGHT[kind])
        sheet.text(LEFT + 19, sheet.y + 29, plain(name), 15, LIGHT["ink"], bold=True)
        sheet.text(LEFT + 19, sheet.y + 48.5, plain(settings), 13, LIGHT["soft"])
        for column, (edge, value) in enumerate(zip(edges[1:], values, strict=True)):
            sheet.text(edge, sheet.y + 29, value, 15, LIGHT["ink"], bold=column == 0, end=True)
        start = edges[0] + 18
        sheet.rectangle(start, sheet.y + 41, edges[1] - start, 4, LIGHT["track"], 'rx="2"')
        sheet.rectangle(start, sheet.y + 41, share / 100 * (edges[1] - start), 4, LIGHT[kind], 'rx="2"')
        sheet.y += 65.2
    sheet.rectangle(LEFT, sheet.y, RIGHT - LEFT, 1, LIGHT["line"])


def plots(sheet: Sheet, page: str) -> None:
    part = section(sheet, page, "Accuracy, cost and training")
    width = (RIGHT - LEFT - 20) / 2
    sheet.y += 14
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", part, re.DOTALL)
    for number, (title, svg) in enumerate(figures):
        drawn_width, drawn_height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        scale = (width - 34) / drawn_width
        height = 54 + scale * drawn_height
        x = LEFT + number % 2 * (width + 20)
        sheet.card(x, sheet.y, width, height)
        sheet.text(x + 19, sheet.y + 32, plain(title), 15, LIGHT["ink"], bold=True)
        inner = standalone(svg, (drawn_width, drawn_height)).strip()
        sheet.parts.append(f'<g transform="translate({x + 17:.1f} {sheet.y + 45:.1f}) scale({scale:.4f})">{inner}</g>')
        if number % 2 or number == len(figures) - 1:
            sheet.y += height + 20
    sheet.y -= 20


def pictures(sheet: Sheet, page: str) -> None:
    part = section(sheet, page, "Example predictions")
    columns = 5
    width = (RIGHT - LEFT - 16 * (columns - 1)) / columns
    cards = re.findall(r'<article class="picture"><img src="(.*?)".*?<h3>(.*?)</h3><ul>(.*?)</ul>', part, re.DOTALL)
    for number, (source, name, items) in enumerate(cards):
        lines = re.findall(
            r'<li class="(\w+)"><span.*?>(.)</span><span.*?>(.*?)</span><b>(.*?)</b><span.*?>(.*?)<', items
        )
        height = width + 10 + 24 + 21.1 * len(lines) + 11
        x, y = LEFT + number % columns * (width + 16), sheet.y
        sheet.card(x, y, width, height)
        rounded = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{width + 12:.1f}" rx="12"/>'
        sheet.parts.append(
            f'<clipPath id="top{number}">{rounded}</clipPath><image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{width:.1f}" xlink:href="{source}" clip-path="url(#top{number})"/>'
        )
        sheet.text(x + 11, y + width + 25, plain(name), 15, LIGHT["ink"], bold=True)
        for line, (kind, mark, method, said, sure) in enumerate(lines):
            base = y + width + 49 + 21.1 * line
            sheet.text(x + 11, base, mark, 12.5, LIGHT[kind], bold=True)
            sheet.text(x + 28, base, plain(method), 12.5, LIGHT["soft"])
            sheet.text(
                x + width - 55, base, plain(said), 12.5, LIGHT["wrong" if kind == "wrong" else "ink"], True, True
            )
            sheet.text(x + width - 11, base, plain(sure), 12.5, LIGHT["soft"], end=True)
        if number % columns == columns - 1 or number == len(cards) - 1:
            sheet.y += height + 16


def main(report: str) -> None:
    page = Path(report).read_text(encoding="utf-8")
    sheet = Sheet()
    head(sheet, page)
    table(sheet, page)
    sheet.save("demo-table.png", sheet.y + 15)
    plots(sheet, page)
    pictures(sheet, page)
    sheet.save("demo-report.png", sheet.y + 10)


if __name__ == "__main__":
    main(*sys.argv[1:])
