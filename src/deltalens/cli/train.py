"""Adapt a backbone to a folder of images, or of point clouds; for classes of images, pixels or objects.

The data folder holds train/<class>/*.jpg (and val, test), or <class>/*.jpg, which is then split by seed, or what
--format says: a table of labels, VTAB-1k, FGVC, VOC 2007, a set of torchvision or of the Hugging Face hub; or clouds
in one of the formats of theirs, for a model that takes points. With masks or boxes (VOC, COCO, YOLO, mask folders,
ADE20K, Cityscapes, DOTA, roLabelImg) --task segmentation, detection, instance or oriented trains a dense head and the
adapter below it. The output folder gets the adapter (adapter_config.json, adapter_model.safetensors, README.md),
config.yaml, which reproduces the run with `deltalens train --config OUTPUT/config.yaml --output ANOTHER`, metrics.csv
and results.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli import dense_options, method_options, recipes
from deltalens.cli.method_options import MODEL_HELP, add_method_argument

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

BATCH_SIZE = 64
# What a resumed run may change. Everything else decides what is trained, and on what.
CHANGEABLE = {
    "output", "lr", "weight_decay", "clip_grad", "workers", "precision", "compile", "devices",
    "accelerator", "checkpoint_every_steps", "deterministic", "cache_features", "report",
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options; every one may also stand in a YAML file."""
    add_shared_arguments(parser)
    dense_options.add_arguments(parser)
    add = parser.add_argument
    add(
        "--cache-features",
        type=str | None,
        default=None,
        metavar="DIR",
        help="keep the features below the first trained block here, and train from them; nothing may be augmented",
    )
    add("--resume", action="store_true", help="go on with a run that was stopped")
    add("--overwrite", action="store_true", help="replace the run that the output folder holds")


def add_shared_arguments(parser: ArgumentParser) -> None:
    """The options that describe one training, which `tune` has too."""
    add = parser.add_argument
    add("--model", type=str, default="deltalens/vit-mini", help=MODEL_HELP)
    add("--pretrained", type=bool, default=True, help="start from pretrained weights; false is for experiments only")
    add("--checkpoint", type=str | None, default=None, help="weights file of the backbone, instead of the hub's")
    add("--img-size", type=int | None, default=None, help="input size in pixels, where the model allows another")
    add(
        "--normalize",
        type=Literal["unit_sphere", "none"] | None,
        default=None,
        help="of clouds: centre and scale them into the unit sphere, or not; null for what the model expects",
    )
    add(
        "--num-points",
        type=int | None,
        default=None,
        help="points of a cloud that the model is given; null for its own",
    )
    add(
        "--templates",
        type=list[str] | str | None,
        default=None,
        help="make the classes texts, as in CLIP: 'a photo of a {}.', a list of such, or a file of them; for models "
        "with a text tower",
    )
    add(
        "--descriptions",
        type=str | None,
        default=None,
        metavar="FILE",
        help="JSON file of class: sentences, which stand in the place of templates, or with --templates in them: "
        "'a photo of a {}, which has {description}.'",
    )
    add("--tower", type=str | None, default=None, help="adapt only this tower of a model with several: vision, text")
    add_method_argument(parser)
    add(
        "--recipe",
        type=str | None,
        default=None,
        help="settings that come with the package (deltalens list recipes)",
    )
    add("--data", type=str, required=True, help="folder of images or point clouds, or a table")
    add(
        "--format",
        type=str,
        default="auto",
        help="folder, csv, multilabel, hf, vtab1k/<task>, fgvc/<set>, coop/<dataset>, voc2007, voc2007/single, "
        "torchvision/<Name>; clouds: points-folder, scanobjectnn/<variant>, modelnet40, modelnet10, "
        "points-few-shot/<fold>; masks: masks, ade20k, cityscapes, voc-masks; boxes: voc, coco, yolo; oriented "
        "boxes: dota, rolabelimg; auto goes by the files",
    )
    add(
        "--protocol",
        type=Literal["val", "trainval"],
        default="val",
        help="trainval trains on train and val together, for a last run whose settings were chosen before",
    )
    add("--download", type=bool, default=False, help="fetch the data where a format knows how")
    add(
        "--shots",
        type=int | None,
        default=None,
        help="so many training images or clouds of every class, drawn by --seed",
    )
    add(
        "--stored-shots",
        type=bool,
        default=True,
        help="take them from a split_fewshot file of CoOp's where there is one",
    )
    add(
        "--classes",
        type=Literal["all", "base", "new"],
        default="all",
        help="all, or the first or the second half of them, as base-to-novel protocols do",
    )
    add("--output", type=str, required=True, help="folder for the results")
    add(
        "--val-fraction",
        type=float,
        default=0.15,
        help="share of the data for validation where the data has no val folder",
    )
    add(
        "--test-fraction",
        type=float,
        default=0.15,
        help="share of the data for test where the data has no split folders",
    )
    add("--split-seed", type=int | None, default=None, help="of the split and of --train-fraction; by default --seed")
    add("--train-fraction", type=float | None, default=None, help="train on this share of every class only")
    add("--skip-broken", type=bool, default=False, help="leave out images or clouds that cannot be read")
    add("--allow-missing-classes", type=bool, default=False, help="let val and test lack classes of train")
    add("--min-crop", type=float, default=0.5, help="smallest share of an image that a training crop keeps")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip; 0 where left and right differ")
    add("--rand-augment", type=int, default=0, help="magnitude of RandAugment, 0 for none, 9 is usual")
    add(
        "--cloud-augment",
        type=str,
        default="scale+shift",
        help="of training clouds: scale, shift, rotate joined by +, or none; only of models that take clouds",
    )
    add("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    add("--epochs", type=int, default=20, help="passes over the training data")
    add(
        "--batch-size",
        type=int | None,
        default=None,
        help="images or clouds a step, over all devices together; by default 64, in segmentation 8, of objects 4",
    )
    add("--lr", type=float | None, default=None, help="peak learning rate; by default the method's own")
    add("--base-lr", type=float | None, default=None, help="instead of --lr: the rate for 256 images a step")
    add("--weight-decay", type=float, default=1e-4, help="on matrices of linear and convolution layers only")
    add(
        "--no-decay",
        type=list[str] | None,
        default=None,
        help='decay all that is trained but what has one of these texts in its path, such as "[norm, bias]"',
    )
    add("--warmup-epochs", type=float, default=1.0, help="warm-up, linear or at --warmup-lr; --decay follows")
    add("--warmup-lr", type=float | None, default=None, help="constant rate of the warm-up, instead of a linear one")
    add(
        "--schedule",
        type=Literal["step", "epoch"],
        default="step",
        help="change the rate at every step, or once an epoch as CoOp and those after it do",
    )
    add(
        "--decay",
        type=Literal["cosine", "linear", "steps"],
        default="cosine",
        help="how the rate falls after the warm-up; steps: to a tenth at each of --decay-at",
    )
    add("--decay-at", type=list[float], default=[], help='epochs from which the rate is a tenth, such as "[8, 11]"')
    add("--min-lr", type=float, default=0.0, help="where the fall ends, as a share of the rate: 0.01 for 1 per cent")
    add("--optimizer", type=Literal["adamw", "sgd"], default="adamw", help="adamw, or sgd with momentum 0.9")
    add("--eps", type=float, default=1e-8, help="what AdamW adds to its denominators")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient, 0 for no clipping")
    add("--seed", type=int, default=0, help="of everything random: split, initialisation, order, augmentation, dropout")
    add("--workers", type=int | None, default=None, help="loader processes; by default by the number of cores")
    add("--precision", type=Literal["32", "bf16", "16", "64"], default="32", help="bf16 and 16 are mixed precision")
    add("--compile", type=bool, default=False, help="torch.compile the model")
    add("--devices", type=int | str, default=1, help='number of devices, a list such as "0,2", or "auto"')
    add("--accelerator", type=Literal["auto", "cpu", "gpu", "mps"], default="auto", help="where to train")
    add("--deterministic", type=bool, default=False, help="for bit-equal runs on a GPU or on several threads")
    add("--checkpoint-every-steps", type=int, default=0, help="checkpoint also within epochs, for very long ones")


def translate(argv: list[str]) -> list[str]:
    """Gather the --method words, put a recipe's file in the place of its name, let --resume read the run's config."""
    return _with_config_of_the_run(dense_options.translate(translate_words(argv)))


def translate_words(argv: list[str]) -> list[str]:
    """Gather the --method words, put a recipe's file in the place of its name."""
    return recipes.translate(method_options.translate(argv))


def _with_config_of_the_run(argv: list[str]) -> list[str]:
    """`--resume --output DIR` takes from DIR/config.yaml whatever is not said again."""
    from pathlib import Path

    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--output=") else [word])]
    if "--resume" not in words or "--config" in words or "--output" not in words[:-1]:
        return argv
    config = Path(words[words.index("--output") + 1]) / "config.yaml"
    return ["--config", str(config), *argv] if config.is_file() else argv


def run(args: Namespace) -> None:
    """Train, and print what came out."""
    from deltalens.cli.method_options import read_methods
    from deltalens.cli.training_words import print_results, print_start
    from deltalens.training import fit
    from deltalens.training.output import Output, is_main_process

    methods = read_methods(args.method)
    ours = ("config", "recipe", "resume", "overwrite")
    options = {key: value for key, value in vars(args).items() if key not in ours}
    dense = dense_options.dense_task_of(options)
    dense_options.check_meaning(dense, options)
    options = settled(dense_options.settled(dense, options), methods)
    output = Output(args.output)
    if is_main_process():
        output.check(args.resume, args.overwrite)
    if args.resume:
        _check_same_run(output, options)
        if output.finished:
            print(f"{output.folder} holds a finished run; there is nothing to resume")
            if is_main_process():
                output.tidy()
            print_results(output.read_results(), output)
            return
    data = read_images(options)
    if dense is not None:
        from deltalens.cli.dense_run import run_dense

        run_dense(options, methods, data, output, args.resume, args.overwrite)
        return
    task = build_task(options, methods, data)
    if is_main_process():
        print_start(task, data, options)
    results = fit(
        task,
        data,
        settings_of(options),
        output.folder,
        resume=args.resume,
        overwrite=args.overwrite,
        config=options,
        cache_features=args.cache_features,
    )
    if is_main_process():
        print_results(results, output)


# ------------------------------------------------------------------ building
def settled(options: dict[str, Any], methods: list) -> dict[str, Any]:
    """The options with everything written out that was left to a default of the methods, the seed or the machine."""
    from deltalens.cli.method_options import method_entries
    from deltalens.training.loaders import default_workers

    workers = options.get("workers")
    if options["batch_size"] is None:
        options = options | {"batch_size": dense_options.BATCH_SIZE.get(options.get("task"), BATCH_SIZE)}
    return options | {
        "method": method_entries(methods),
        "lr": settled_rate(options, methods),
        "base_lr": None,
        "workers": default_workers() if workers is None else workers,
        "split_seed": split_seed(options),
    }


def settled_rate(options: dict[str, Any], methods: list) -> float:
    """The learning rate that --lr, --base-lr, or neither asks for. ValueError for both."""
    from deltalens.studies.search_space import rate_of
    from deltalens.training.optim import default_learning_rate

    lr, base_lr = options.get("lr"), options.get("base_lr")
    if lr is not None and base_lr is not None:
        raise ValueError(
            f"say --lr or --base-lr, not both: got {lr:g} and {base_lr:g} (--lr null takes a recipe's back)"
        )
    if base_lr is not None:
        return rate_of(base_lr, options["batch_size"] or BATCH_SIZE)
    usual = min(default_learning_rate(methods), dense_options.LEARNING_RATE.get(options.get("task"), float("inf")))
    return usual if lr is None else lr


def split_seed(options: dict[str, Any]) -> int:
    """The seed that draws parts of the data, and shares of them."""
    own = options.get("split_seed")
    return options["seed"] if own is None else own


def settings_of(options: dict[str, Any]):
    """The runner's settings among the options."""
    from dataclasses import fields

    from deltalens.training.settings import TrainingSettings

    names = {field.name for field in fields(TrainingSettings)}
    return TrainingSettings(**{key: value for key, value in options.items() if key in names})


def read_images(options: dict[str, Any]):
    """The data, without transforms, with the images and classes that are asked for."""
    from deltalens.data import ReadOptions, TrainingSubset, read_data

    if options["train_fraction"] is not None and options["shots"] is not None:
        raise ValueError("--train-fraction and --shots are two ways to say the same: give one of them")
    chosen = {"shots_seed": options["seed"], "subset": options["classes"], "seed": split_seed(options)}
    named = vars(ReadOptions()).keys() & options.keys()
    reading = ReadOptions(**{name: options[name] for name in named - chosen.keys()}, **chosen)
    data = read_data(options["data"], options["format"], protocol=options["protocol"], options=reading)
    return TrainingSubset(options["train_fraction"], chosen["seed"]).take(data)


def build_task(options: dict[str, Any], methods: list, data):
    """The task with its adapted backbone. The data gets its transforms. Everything that can be wrong with the options
    is found here, before anything is written."""
    import torch

    import deltalens as dl
    from deltalens.cli.sized_backbone import create_sized_backbone
    from deltalens.data.inputs import Augmentation, set_inputs
    from deltalens.data.prompts import class_texts
    from deltalens.tasks import task_class

    torch.manual_seed(options["seed"])
    texts = class_texts(data.class_names, options.get("templates"), options.get("descriptions"))
    model, preprocessing = create_sized_backbone(
        options["model"],
        len(data.class_names),
        options["img_size"],
        options["num_points"],
        options["normalize"],
        pretrained=options["pretrained"],
        checkpoint=options["checkpoint"],
        **texts,
    )
    dl.attach(model, methods, tower=options.get("tower"))
    dl.adapter_info(model)["preprocessing"] = preprocessing
    set_inputs(data.train, preprocessing, Augmentation.among(options))
    for part in (part for part in (data.val, data.test) if part is not None):
        set_inputs(part, preprocessing)
    return task_class(data.task)(model, data.class_names, options["label_smoothing"])


def _check_same_run(output, options: dict[str, Any]) -> None:
    """ValueError where a run to be resumed was started with other settings."""
    earlier = output.read_config() or {}
    changed = [
        f"{key} was {earlier[key]!r} and is {options[key]!r}"
        for key in options
        if key in earlier and key not in CHANGEABLE and earlier[key] != options[key]
    ]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, and these differ from {output.config}: {'; '.join(changed)}. "
            f"deltalens train --output {output.folder} --resume takes them from there"
        )
