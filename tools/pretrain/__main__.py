"""Pretrain the shipped backbones and write their packaged files.

python -m tools.pretrain train --model swin-mini --data DATA --output local/pretrain/swin-mini --resume
python -m tools.pretrain export --data DATA local/pretrain/swin-mini/last.pt
python -m tools.pretrain clip --data DATA --output local/pretrain/clip-mini --resume
python -m tools.pretrain clip-export --data DATA local/pretrain/clip-mini/last.pt

python -m tools.pretrain points --data VOXELS --output local/pretrain/points-mini --resume
python -m tools.pretrain points-export --data VOXELS local/pretrain/points-mini/last.pt

DATA is the folder `tiny_imagenet_48`, VOXELS the folder `modelnet10_voxels`.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction, Namespace

from .models import ANY_SIZE


def parse_args() -> Namespace:
    parser = ArgumentParser(prog="python -m tools.pretrain", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", formatter_class=ArgumentDefaultsHelpFormatter))
    _add_clip(commands.add_parser("clip", help="train clip-mini", formatter_class=ArgumentDefaultsHelpFormatter))
    _add_points(commands.add_parser("points", help="train points-mini", formatter_class=ArgumentDefaultsHelpFormatter))
    for command in ("export", "clip-export", "points-export"):
        export = commands.add_parser(command, help="write EMA weights, metrics and card into the package")
        export.add_argument("checkpoint")
        export.add_argument("--data", required=True, help="folder of the data set trained on")
        export.add_argument("--threads", type=int, help="torch threads")
    return parser.parse_args()


def _add_clip(parser: ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of tiny_imagenet_48")
    parser.add_argument("--output", required=True, help="folder of last.pt and log.csv")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--budget-minutes", type=float, help="end, fully annealed, after this wall-clock time")
    parser.add_argument("--text-minutes", type=float, default=4.0, help="for the text tower on kept features, before")
    parser.add_argument("--log-steps", type=int, default=400)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--bf16", action=BooleanOptionalAction, default=True)
    parser.add_argument("--opt", default="nmuon", help="a timm optimiser")
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--text-batch-size", type=int, default=1024, help="kept features in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the text tower alone")
    parser.add_argument("--joint-lr", type=float, default=1e-3)
    parser.add_argument("--final-lr", type=float, default=1e-6)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of each part")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--min-area", type=float, default=0.4, help="of the random resized crop")
    parser.add_argument("--color-jitter", type=float, default=0.2)
    parser.add_argument("--drawn-share", type=float, default=0.1, help="of drawn pictures among the images")
    parser.add_argument("--held-out-pictures", type=int, default=1000, help="drawn, of unseen pairs, for the log")


def _add_points(parser: ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of modelnet10_voxels")
    parser.add_argument("--output", required=True, help="folder of last.pt and log.csv")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--budget-minutes", type=float, help="end, fully annealed, after this wall-clock time")
    parser.add_argument("--log-steps", type=int, default=200)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--bf16", action=BooleanOptionalAction, default=True)
    parser.add_argument("--opt", default="adamw", help="a timm optimiser")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--final-lr", type=float, default=1e-6)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--clip-grad", type=float, default=10.0)
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--mask-ratio", type=float, default=0.6, help="share of hidden patches")
    parser.add_argument("--decoder-depth", type=int, default=2)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--scale", type=float, default=1.5, help="largest stretching of an axis; 1 / scale the least")
    parser.add_argument("--shift", type=float, default=0.2)


def _add_train(parser: ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--model", required=True, choices=list(ANY_SIZE))
    run.add_argument("--data", required=True, help="folder of tiny_imagenet_48")
    run.add_argument("--output", required=True, help="folder of last.pt and log.csv")
    run.add_argument("--resume", action="store_true", help="go on from last.pt where there is one")
    run.add_argument("--epochs", type=int, default=300)
    run.add_argument("--budget-minutes", type=float, help="end, fully annealed, after this wall-clock time")
    run.add_argument("--log-steps", type=int, default=625, help="steps between validations and log lines")
    run.add_argument("--save-minutes", type=float, default=3.0)
    run.add_argument("--seed", type=int, default=0)

    speed = parser.add_argument_group("speed")
    speed.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    speed.add_argument("--threads", type=int, help="torch threads")
    speed.add_argument("--bf16", action=BooleanOptionalAction, default=True)
    speed.add_argument("--compile", action="store_true")
    speed.add_argument("--early-sizes", type=int, nargs="*", default=[], help="image sizes before the native one")
    speed.add_argument("--native-from", type=float, default=0.6, help="progress from which the native size is used")

    optimiser = parser.add_argument_group("optimiser")
    optimiser.add_argument("--opt", default="adamw", help="a timm optimiser")
    optimiser.add_argument("--batch-size", type=int, default=128)
    optimiser.add_argument("--lr", type=float, default=1e-3)
    optimiser.add_argument("--final-lr", type=float, default=1e-6)
    optimiser.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    optimiser.add_argument("--weight-decay", type=float, default=0.05)
    optimiser.add_argument("--clip-grad", type=float, default=1.0)
    optimiser.add_argument("--ema-decay", type=float, default=0.999)

    regularisation = parser.add_argument_group("augmentation and regularisation")
    regularisation.add_argument("--min-area", type=float, default=0.5, help="of the random resized crop")
    regularisation.add_argument("--color-jitter", type=float, default=0.2)
    regularisation.add_argument("--erasing", type=float, default=0.0)
    regularisation.add_argument("--mixup", type=float, default=0.1, help="alpha, 0 for none")
    regularisation.add_argument("--cutmix", type=float, default=0.0, help="alpha, 0 for none")
    regularisation.add_argument("--smoothing", type=float, default=0.1)
    regularisation.add_argument("--drop-path", type=float, default=0.0)
    regularisation.add_argument("--teacher", help="timm model with the same classes to distil from")


def main() -> None:
    args = parse_args()
    if args.command == "train":
        from .train import Trainer

        Trainer(args).run()
    elif args.command == "clip":
        from .clip.train import ClipTrainer

        ClipTrainer(args).run()
    elif args.command == "points":
        from .points.train import PointTrainer

        PointTrainer(args).run()
    elif args.command == "points-export":
        from .points.export import export

        export(args)
    elif args.command == "clip-export":
        from .clip.export import export

        export(args)
    else:
        from .export import export

        export(args)


if __name__ == "__main__":
    main()
