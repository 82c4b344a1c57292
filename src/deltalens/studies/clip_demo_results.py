"""What the demonstration of CLIP found: plain values that its report, table and JSON are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltalens.studies.harmonic_mean import harmonic_mean
from deltalens.studies.results import Epoch, Picture, Prediction


@dataclass(frozen=True)
class ClipRun:
    """One method. parameters: trained ones; backbone_parameters: of both towers. base, novel: accuracies, 0 to 1; novel
    is None where the method cannot answer for other classes than its own, and `refusal` says why. seconds: of training.
    folder: where the adapter lies, None without one. base_answers, novel_answers: one for each shown picture."""

    method: str
    settings: Mapping[str, Any]
    parameters: int
    backbone_parameters: int
    base: float
    novel: float | None
    seconds: float
    adapter_bytes: int
    epochs: list[Epoch] = field(default_factory=list)
    base_answers: list[Prediction] = field(default_factory=list)
    novel_answers: list[Prediction] = field(default_factory=list)
    folder: str | None = None
    refusal: str | None = None

    @property
    def mean(self) -> float | None:
        """Harmonic mean of base and novel; None without novel."""
        return None if self.novel is None else harmonic_mean(self.base, self.novel)

    @property
    def percent(self) -> float:
        """100 * trained / both towers."""
        return 100 * self.parameters / self.backbone_parameters


@dataclass(frozen=True)
class ClipComparison:
    """Everything the report says. base_images, novel_images: how many the accuracies are measured on. intro:
    paragraphs, separated by blank lines. conditions: what was run, name -> value."""

    title: str
    intro: str
    runs: list[ClipRun]
    base_images: int
    novel_images: int
    base_pictures: list[Picture]
    novel_pictures: list[Picture]
    pictures_note: str
    conditions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the pixels."""
        return {
            "title": self.title,
            "base_images": self.base_images,
            "novel_images": self.novel_images,
            "runs": [
                asdict(run) | {"settings": dict(run.settings), "mean": run.mean, "percent": run.percent}
                for run in self.runs
            ],
            "base_pictures": [picture.true_name for picture in self.base_pictures],
            "novel_pictures": [picture.true_name for picture in self.novel_pictures],
            "conditions": dict(self.conditions),
        }


def share_text(value: float | None) -> str:
    """0.754 -> "75.4 %"; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"
