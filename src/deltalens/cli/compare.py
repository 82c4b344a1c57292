"""Compare methods: run every method of a study file on every backbone, dataset and seed, and make one table.

STUDY is a YAML file, or the name of one that comes with the package (deltalens list recipes). Every run is a folder
under OUTPUT/runs. What is finished is not done again: after a kill the same command goes on where it stopped. OUTPUT
gets report.html, table.md, table.tex, runs.csv and plots/*.svg.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from deltalens.cli import recipes
from deltalens.cli.repeated import gather

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import ArgumentParser, Namespace

    from deltalens.studies.fleet import Crew, Job
    from deltalens.studies.grid import Grid


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("study", type=str, help="study file, or the name of one in the package")
    add("--output", type=str, required=True, help="folder for the runs and the table")
    add(
        "--data",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="a folder of images and its name, beside or instead of those in the study file; may be repeated. A FOLDER "
        "alone is that of all datasets of the file that have none",
    )
    add(
        "--only",
        type=str,
        nargs="+",
        default=[],
        metavar="WORD",
        help="do only the runs of this method, dataset, backbone or folder (seed-0); may be repeated",
    )
    add("--parallel", type=int, default=1, help="runs at a time, each in a process of its own")
    add(
        "--ray",
        type=str | None,
        default=None,
        metavar="ADDRESS",
        help="carry the runs out with Ray: local, auto (RAY_ADDRESS, or the cluster found here), or an address",
    )
    add("--dry-run", action="store_true", help="list the runs, their number and the time they may take, and stop")
    add(
        "--only-table", action="store_true", help="make report, tables and plots from the runs that are there, and stop"
    )
    add("--retry-failed", action="store_true", help="try runs that failed once more")
    add(
        "--cache-features",
        type=str | None,
        default=None,
        metavar="DIR",
        help="keep the features of frozen networks here, for methods that train the head or the last blocks only",
    )
    add("--threads", type=int | None, default=None, help="processor threads of a run; null for its share")
    add(
        "--workers",
        type=int | None,
        default=None,
        help="loader processes of a run; null for its share of the cores",
    )
    add("--accelerator", type=Literal["auto", "cpu", "gpu", "mps"], default="auto", help="where to train")


def translate(argv: list[str]) -> list[str]:
    """Gather the words of several `--data` into one, which argparse would take the last of; `--only` the same."""
    rest, found = gather(argv, ("--data", "--only"))
    return rest + [word for option, values in found.items() if values for word in (option, *values)]


def run(args: Namespace) -> None:
    """Run the study, and print its table."""
    from pathlib import Path

    from deltalens.cli.sized_backbone import create_sized_backbone
    from deltalens.studies.fleet import Job, run_study
    from deltalens.studies.study_reader import read_study

    for name, least in (("threads", 1), ("workers", 0), ("parallel", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.only and args.only_table:
        raise ValueError("--only-table makes the table of all runs: leave out --only")
    study = read_study(study_file(args.study), read_data(args.data))
    job = Job(
        study,
        Path(args.output),
        create_sized_backbone,
        tuple(args.only),
        args.threads,
        args.workers,
        args.accelerator,
        args.cache_features,
    )
    if args.dry_run:
        _list(job, args.parallel)
        return
    if args.only_table:
        _write_table(job.grid())
        return
    try:
        run_study(
            job,
            _crew(job, args.parallel, args.ray),
            args.parallel,
            retry_failed=args.retry_failed,
            show=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the study was stopped; the same command goes on") from None
    _write_table(job.grid())


def _crew(job: Job, parallel: int, address: str | None) -> Crew | None:
    """Who carries out the runs; None for this process."""
    if address is not None:
        from deltalens.studies.ray_crew import RayCrew

        return RayCrew(job, parallel, address)
    if parallel == 1:
        return None
    import torch

    from deltalens.studies.local_crew import LocalCrew, visible_gpus
    from deltalens.training.loaders import cores_at_hand

    share = job.sharing(torch.get_num_threads() // parallel, cores_at_hand() // parallel)
    return LocalCrew(share, visible_gpus() if job.accelerator in ("auto", "gpu") else ())


def study_file(name: str) -> Path:
    """The file of that name, or the package's. ValueError with the nearest names where there is neither."""
    import difflib
    from pathlib import Path

    known = recipes.recipe_files("compare")
    if Path(name).is_file():
        return Path(name)
    named = name.removeprefix("recipes/").removesuffix(".yaml")
    if named in known:
        return known[named]
    near = difflib.get_close_matches(name, known, n=2) or list(known)
    raise ValueError(f"there is no study file {name!r}, nor one of that name in the package; it has {', '.join(near)}")


def read_data(words: list[str]) -> dict[str, str]:
    """NAME=FOLDER words as a mapping; a FOLDER alone has the name ""."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals:
            name, folder = "", word
        elif not (name and folder):
            raise ValueError(f"--data takes NAME=FOLDER, such as --data flowers=/data/flowers, got {word!r}")
        if name in found:
            raise ValueError(f"--data names {name!r} twice" if name else "--data has two folders without a name")
        found[name] = folder
    return found


def _list(job: Job, parallel: int) -> None:
    from deltalens.studies.locks import RunLocks
    from deltalens.studies.progress import Progress, duration_text

    grid = job.grid()
    locks, runs = RunLocks(grid.output), job.runs(grid)
    counts = {"finished": 0, "failed": 0, "open": 0}
    for run in runs:
        state = grid.state(run)
        counts[state] += 1
        remark = "in work" if state == "open" and locks.held_elsewhere(run) else state
        print(run.describe() + ("" if remark == "open" else f" ({remark})"))
    if grid.study.left_out:
        print(f"left out, since no folder was given: {', '.join(grid.study.left_out)}")
    print(f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    left = Progress(grid, runs, parallel).left()
    if counts["open"] and left is not None:
        print(f"about {duration_text(left)} left")


def _write_table(grid: Grid) -> None:
    from deltalens.lifecycle.atomic import remove_leftovers, write_text
    from deltalens.studies.study_latex import to_latex
    from deltalens.studies.study_plots import write_plots
    from deltalens.studies.study_report import write_study_report
    from deltalens.studies.study_table import read_table

    table = read_table(grid)
    for folder in (grid.output, grid.output / "plots"):
        remove_leftovers(folder)
    write_text(grid.output / "table.md", table.to_markdown())
    write_text(grid.output / "table.tex", to_latex(table))
    write_text(grid.output / "runs.csv", table.to_csv())
    plots = write_plots(table, grid.output / "plots", grid.study.x_title)
    report = grid.output / "report.html"
    write_study_report(grid, table, report)
    print(f"\n{table.to_markdown()}")
    print(f"table.md, table.tex, runs.csv and {len(plots)} plots are in {grid.output}")
    print(f"the report is {report}")
