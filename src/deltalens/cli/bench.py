"""Measure what the methods cost on this machine: time and memory of the shipped forms beside the published forms,
the frozen backbone and full fine-tuning, all in one run.

Contenders run in turns (A B C D, A B C D, ...) on random weights with dropout 0; a ratio is the median over the rounds
of the ratios within a round. A training step is forward and backward; "saved MB" is what autograd keeps for backward,
each storage once, without parameters. On a GPU the peak memory of a step is shown too. Targets are checked for the
models they are stated for: VPT-deep and Adapter-X on ViT-B/16, Mona on Swin-T, attaching and files on ViT-L, MMA on
CLIP ViT-B/16, patches on Point-MAE, Mona in dense prediction on Swin-T and Swin-B at 512 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

PARTS = ("vpt", "mona", "lifecycle")  # those that run where none is named
FURTHER = ("clip", "prompts", "points", "adapter-x", "dense")


HELP = (
    "what to measure; vpt, mona and lifecycle where none is named; clip is MMA, CoOp and CoCoOp on a two-tower model, "
    "which needs open_clip; prompts is VPT's cost table over prompt lengths; points is the making of patches of point "
    "clouds; adapter-x is its pool of experts beside AdaptFormer, and sorted by expert; dense is Mona on Swin under "
    "RetinaNet and UPerNet"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of `deltalens bench`."""
    add = parser.add_argument
    add("parts", nargs="*", type=Literal[(*PARTS, *FURTHER)], default=list(PARTS), help=HELP)
    add("--model", type=str | None, help="instead of a part's own model; vpt needs a ViT with a class token")
    add("--img-size", type=int | None, help="edge of the input images in pixels; null for the model's own")
    add("--batch-size", type=int | None, help="images in a batch; null for 4, in clip 16, in points 32, in dense 2")
    add("--classes", type=int | None, help="classes of clip, each a text; null for 100")
    add(
        "--head",
        type=Literal["retinanet", "upernet", "oriented"] | None,
        help="of dense: one of its parts; oriented is IoU and NMS of oriented boxes; null for all",
    )
    add("--rounds", type=int, default=7, help="interleaved rounds of training steps, twice as many of inference")
    add("--threads", type=int | None, help="processor threads; null for torch's choice")
    add("--device", type=str | None, help="cpu, cuda, cuda:1...; null for a GPU where there is one")
    add(
        "--clock",
        type=Literal["wall", "cpu"],
        default="wall",
        help="cpu counts this process's processor time; on a busy machine use it with --threads 1",
    )
    add("--quick", action="store_true", help="small shipped backbones, batch 2, 3 rounds; no targets")
    add("--check", action="store_true", help="exit code 1 where a target is missed")
    add("--plot", type=str | None, help="file for the figure of prompts: .svg, .png or .pdf")
    add("--json", type=str | None, help="also write everything to this file")


def run(args: Namespace) -> int:
    """Measure, print, write. Exit code 1 where --check was given and a target is missed."""
    _check(args)

    import torch

    from deltalens.lifecycle.atomic import write_text
    from deltalens.studies import (
        bench_report,
        benchmarks,
        clip_bench,
        dense_bench,
        expert_bench,
        lifecycle_bench,
        point_bench,
        prompt_bench,
    )

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device} was asked for, but torch finds no GPU here; leave it out to use the processor"
        )
    options = benchmarks.Options(
        args.model, args.img_size, args.batch_size, args.rounds, device, args.clock, args.quick, args.classes, args.head
    )
    benches = {
        "vpt": benchmarks.bench_vpt,
        "mona": benchmarks.bench_mona,
        "lifecycle": lifecycle_bench.bench_lifecycle,
        "clip": clip_bench.bench_clip,
        "prompts": prompt_bench.bench_prompts,
        "points": point_bench.bench_points,
        "dense": dense_bench.bench_dense,
        "adapter-x": expert_bench.bench_adapter_x,
    }
    reports = []
    with benchmarks.threads(args.threads):
        for part in dict.fromkeys(args.parts):
            print(f"measuring {part}, which may take minutes ...", file=sys.stderr, flush=True)
            reports.append(benches[part](options))
            print(reports[-1].to_text(), end="\n\n", flush=True)
            if part == "prompts" and args.plot:
                prompt_bench.plot_prompts(reports[-1], args.plot)
                print(f"drawn in {args.plot}")
        if args.json:
            write_text(args.json, bench_report.to_json(reports))
            print(f"written to {args.json}")
    missed = any(not target.met for report in reports for target in report.targets)
    return 1 if args.check and missed else 0


def _check(args: Namespace) -> None:
    for name in ("batch_size", "classes", "rounds", "threads", "img_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.plot:
        from deltalens.studies.figure import check_kind

        check_kind(args.plot)
        if "prompts" not in args.parts:
            raise ValueError("--plot draws the part prompts: deltalens bench prompts --plot FILE")
    if args.json and Path(args.json).is_dir():
        raise IsADirectoryError(f"--json {args.json} is a folder; name a file")
