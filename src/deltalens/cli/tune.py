"""Search for the best settings of a method on the validation images.

Takes the options of `deltalens train`, and a search space. Every trial is trained and judged by the validation images
of its last epoch; test images are not looked at. OUTPUT gets trials.md, trials.csv, a folder for each trial, the
adapter of the best one, and best.yaml, with which `deltalens train --config OUTPUT/best.yaml --output ANOTHER` trains
it again and tests it. After a kill the same command goes on where it stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli import dense_options, recipes, train

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def translate(argv: list[str]) -> list[str]:
    """Gather the words of the method and of the head, put a recipe's file in the place of its name."""
    return dense_options.translate(train.translate_words(argv))


def add_arguments(parser: ArgumentParser) -> None:
    """The options of train, and those of the search."""
    train.add_shared_arguments(parser)
    dense_options.add_arguments(parser, report=False)
    add = parser.add_argument
    add(
        "--space",
        type=str | None,
        default=None,
        help="YAML file, or the name of one in the package (deltalens list recipes); by default the learning rate "
        "around the method's own, and weight decay",
    )
    add("--trials", type=int, default=16, help="how many, counting pruned and failed ones")
    add(
        "--metric",
        type=str | None,
        default=None,
        help="validation metric that decides, the larger the better; by default accuracy, mAP for several labels, "
        "miou, map (of VOC's layout and of oriented boxes map50_voc07) or mask_map for masks and boxes",
    )
    add(
        "--prune",
        type=Literal["none", "median", "halving"],
        default="median",
        help="stop trials early: below the median of the earlier ones, or by successive halving",
    )


def run(args: Namespace) -> None:
    """Search, and print what was found."""
    from deltalens.cli.method_options import method_entries, read_methods
    from deltalens.studies.search_space import DEFAULT, read_space
    from deltalens.studies.tune import Search, trials_table, write_tables
    from deltalens.tasks import main_metric_of

    own = ("config", "recipe", "space", "trials", "metric", "prune", "output")
    options = {key: value for key, value in vars(args).items() if key not in own}
    dense = dense_options.dense_task_of(options)
    dense_options.check_meaning(dense, options)
    options = dense_options.settled(dense, options)
    options["batch_size"] = options["batch_size"] or dense_options.BATCH_SIZE.get(str(dense), train.BATCH_SIZE)
    methods = read_methods(args.method)
    space = DEFAULT if args.space is None else read_space(_space_file(args.space))
    data = train.read_images(options)
    if data.val is None:
        raise ValueError("a search needs validation images: the data has none, or --protocol trainval trains on them")
    search = Search(
        args.output,
        space,
        trials=args.trials,
        metric=args.metric or main_metric_of(data.task, data.origin),
        seed=args.seed,
        prune=args.prune,
        default_lr=train.settled_rate(options, methods),
        batch_size=options["batch_size"],
    )
    _check_same_options(search, options | {"method": method_entries(methods)})
    build = _builder(options, methods, data)
    try:
        search.run(build, show=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the search was stopped; the same command goes on") from None
    write_tables(search)
    _write_best(search)
    print(f"\n{trials_table(search)}")
    best = search.folder_of(search.best())
    print(f"trials.md, trials.csv and best.yaml are in {args.output}, the best adapter in {best}")


def _space_file(name: str):
    import difflib
    from pathlib import Path

    known = recipes.recipe_files("tune")
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=2) or list(known)
    raise ValueError(
        f"there is no search space {name!r}, nor one of that name in the package; it has {', '.join(near)}"
    )


# ------------------------------------------------------------------ one trial
def _builder(options: dict[str, Any], methods: list, data):
    """The function that makes the run of a trial from its values."""
    from dataclasses import replace

    from deltalens.studies.search_space import with_values

    def build(values):
        chosen = with_values(methods, values)
        own = {name: value for name, value in values.items() if not name.startswith("method.")}
        own |= {"base_lr": None} if "lr" in own else {}
        run_options = train.settled(options | own, chosen)
        run_options, task = _task(run_options, chosen, data)
        settings = replace(train.settings_of(run_options), progress=False)
        return task, replace(data, test=None), settings, run_options

    return build


def _task(options: dict[str, Any], methods: list, data):
    """(options with everything written out, the task); the data gets its transforms."""
    from deltalens.cli.dense_training import build_dense_task, fitted_to_data

    if options.get("task") not in dense_options.TASKS:
        return options, train.build_task(options, methods, data)
    options = fitted_to_data(options, data)
    return options, build_dense_task(options, methods, data)


# ------------------------------------------------------------------ files
def _check_same_options(search, options: dict[str, Any]) -> None:
    """ValueError where the folder's search was started with other options."""
    from deltalens.training.output import Output

    place = Output(search.folder)
    earlier = place.read_config()
    if earlier is None:
        place.write_config(options)
        return
    changed = [
        f"{key} was {earlier[key]!r} and is {options[key]!r}"
        for key in options
        if key in earlier
        and key not in train.CHANGEABLE - {"lr", "weight_decay", "clip_grad"}
        and earlier[key] != options[key]
    ]
    if changed:
        raise ValueError(
            f"{search.folder} holds a search with other options: {'; '.join(changed)}. Take another --output"
        )


def _write_best(search) -> None:
    import yaml

    from deltalens.lifecycle.atomic import write_text
    from deltalens.training.output import Output

    config = Output(search.folder_of(search.best())).read_config()
    write_text(search.folder / "best.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
