"""The benchmark of oriented boxes: what is measured, and when `bench dense` shows it."""

from deltalens.studies import dense_bench, oriented_bench
from deltalens.studies.bench_report import Section
from deltalens.studies.benchmarks import Options
from deltalens.studies.oriented_bench import LIMIT, ORIENTED, UPRIGHT, bench_oriented


def test_quick_form():
    sections, targets = bench_oriented(Options(quick=True, rounds=1, clock="cpu"))
    assert [section.title for section in sections] == [
        f"{name}, {scene}"
        for scene in ("spread", "crowded")
        for name in ("IoU 100 x 20", "NMS of 100 at 0.1", "NMS of 100 at 0.5")
    ]
    for section in sections:
        assert [row.name for row in section.rows] == [UPRIGHT, ORIENTED]
        assert section.row(ORIENTED).ratios["upright"] > 0
    assert targets == []  # stated for 2,000 boxes


def test_promises_are_for_spread_boxes_and_every_iou(monkeypatch):
    monkeypatch.setattr(oriented_bench, "BOXES", 40)
    monkeypatch.setattr(oriented_bench, "TRUE_BOXES", 10)
    _, targets = bench_oriented(Options(rounds=1))
    assert [target.what.split(":")[0] for target in targets] == [
        "IoU 40 x 10, spread",
        "NMS of 40 at 0.1, spread",
        "NMS of 40 at 0.5, spread",
        "IoU 40 x 10, crowded",
    ]
    assert {target.limit for target in targets} == {LIMIT}


def test_shown_unless_one_head_is_asked_for(monkeypatch):
    monkeypatch.setattr(dense_bench, "_compare", lambda *_: (Section("whole", []), Section("alone", [])))
    titles = {
        head: [section.title for section in dense_bench.bench_dense(Options(quick=True, rounds=1, head=head)).sections]
        for head in (None, "retinanet", "oriented")
    }
    assert titles["retinanet"] == ["whole", "alone"]
    assert len(titles["oriented"]) == 6
    assert titles[None][:4] == ["whole", "alone"] * 2
    assert len(titles[None]) == 4 + 6
