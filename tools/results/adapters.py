"""The table of what adapters see: some trained one by one, then analysed."""

from __future__ import annotations

import contextlib
import io
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deltalens.cli.main import main as deltalens
from deltalens.training.output import Output

from .page import Page, made_with

SIGNS = "cls/sign_digits"
IMAGE = f"{SIGNS}/test/0/IMG_1128.jpg"
SHARED = "--model deltalens/vit-mini --epochs 8 --batch-size 32 --min-crop 0.6 --workers 0"
PROMPTS = "--method vpt --method.num_tokens 10 --lr 0.01"
TRAINED = {  # folder of a run -> what it is, and its options
    "linear": ("linear: the frozen backbone's class token", "--method linear --lr 0.09"),
    "vpt-0": ("VPT-deep, p = 10", PROMPTS),
    "vpt-1": ("VPT-deep, p = 10, seed 1", f"{PROMPTS} --seed 1"),
    "vpt-2": ("VPT-deep, p = 10, seed 2", f"{PROMPTS} --seed 2"),
    "mona": ("Mona, n = 16", "--method mona --method.bottleneck 16 --lr 0.009"),
}


@dataclass(frozen=True)
class Adapters:
    name: str = "adapters"
    time: str = "8 min"

    @property
    def needs(self) -> list[str]:
        """Folders below --data."""
        return [SIGNS]

    def make(self, data: Path, runs: Path, page: Page, only_page: bool = False) -> None:
        """Train what is not trained yet, analyse it, and put what the analyses say on the page. only_page: train
        nothing. Raises RuntimeError where a command fails, FileNotFoundError where only_page misses a run."""
        runs.mkdir(parents=True, exist_ok=True)
        data, picture = data.resolve(), (page.pictures / f"{self.name}-embeddings.png").resolve()
        place = Path(self.name)
        with contextlib.chdir(runs):
            outputs = {name: Output(place / name) for name in TRAINED}
            for (name, output), words in zip(outputs.items(), _trainings(data, place), strict=True):
                if only_page and not output.finished:
                    raise FileNotFoundError(f"the table {self.name} needs a finished run in {runs / place / name}")
                if not output.finished:
                    _said([*words, "--resume"] if output.checkpoint.is_file() else words)
            said = "".join(_said(words) for words in _analyses(data, place, picture))
            results = {name: output.read_results() for name, output in outputs.items()}
            days = sorted(_day(output) for output in outputs.values())
        shown = _trainings(Path("DATA"), Path("RUNS", self.name))
        shown += _analyses(Path("DATA"), Path("RUNS", self.name), Path(picture.name))
        commands = [shlex.join(["deltalens", *words]) for words in shown]
        rows = [f"| {TRAINED[name][0]} | {100 * each['test']['accuracy']:.1f} |" for name, each in results.items()]
        page.put(
            self.name,
            [
                made_with(self.name, commands, list(results.values()), (days[0], days[-1])),
                "\n".join(["| adapter | test top-1 |", "| --- | ---: |", *rows]),
                "What the analyses print:",
                f"```text\n{said.replace(str(picture), picture.name).strip()}\n```",
                f"![t-SNE of what the head reads, under three methods]({page.images}/{picture.name})",
            ],
        )


def _trainings(data: Path, place: Path) -> list[list[str]]:
    return [
        ["train", "--data", str(data / SIGNS), "--output", str(place / name), *options.split(), *SHARED.split()]
        for name, (_, options) in TRAINED.items()
    ]


def _analyses(data: Path, place: Path, picture: Path) -> list[list[str]]:
    signs, at = str(data / SIGNS), lambda *names: [str(place / name) for name in names]
    return [
        ["analyze", "embeddings", *at("linear", "vpt-0", "mona"), "--data", signs, "--output", str(picture)],
        ["analyze", "attention", *at("vpt-0"), "--image", str(data / IMAGE), "--output", str(place / "attention.png")],
        ["analyze", "ensemble", *at("vpt-0", "vpt-1", "vpt-2"), "--data", signs],
    ]


def _day(output: Output) -> str:
    """When a run was finished; those of earlier versions do not say so, and their file's date is taken."""
    said = output.read_results().get("finished")
    return said[:10] if said else datetime.fromtimestamp(output.results.stat().st_mtime, UTC).date().isoformat()


def _said(words: list[str]) -> str:
    """What a command prints. RuntimeError where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failed = deltalens(words)
    if failed:
        raise RuntimeError(f"deltalens {shlex.join(words)} failed; the page is as it was")
    return printed.getvalue()
