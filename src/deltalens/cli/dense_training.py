"""The network, the transforms and the task of a dense training run, from the options of `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from deltalens.data.splits import Splits

LARGEST_CROP, MULTIPLE, LOOKED_AT = 512, 32, 50


def fitted_to_data(options: dict[str, Any], data: Splits) -> dict[str, Any]:
    """The options with the crop size written out: the short side of most of the first training pictures, rounded up to
    a multiple of 32, at most 512."""
    if options["task"] != "segmentation" or options["crop_size"] is not None:
        return options
    import statistics

    train: Any = data.train
    sides = [min(train.image(index).size) for index in range(min(LOOKED_AT, len(train)))]
    side = min(LARGEST_CROP, -(-int(statistics.median_low(sides)) // MULTIPLE) * MULTIPLE)
    return options | {"crop_size": side}


def build_dense_task(options: dict[str, Any], methods: list[Any], data: Splits) -> nn.Module:
    """The task with its adapted network. The data get their transforms. Everything that can be wrong with the options
    is found here, before anything is written."""
    import torch

    import deltalens as dl
    from deltalens.data.inputs import Augmentation, set_inputs
    from deltalens.tasks import Inference
    from deltalens.tasks.made import make_task

    if data.task != options["task"]:
        raise ValueError(f"{options['data']} is data for {data.task}, not for {options['task']}")
    _refuse_difficult_alone(options, data)
    torch.manual_seed(options["seed"])
    network = create_network(options, len(data.class_names))
    dl.attach(network, methods)
    info = dl.adapter_info(network)
    info["preprocessing"] = dl.preprocessing(network)
    if options["test_size"] is not None:
        info["preprocessing"]["test_size"] = list(options["test_size"])
    said = {name: options[name] for name in ("window", "stride") if options.get(name) is not None}
    if said:
        Inference(**said)  # which says what is wrong
        info["inference"] = said
    info["split"] = dict(data.origin)
    tuples = {name: tuple(value) for name, value in options.items() if isinstance(value, list) and name != "method"}
    set_inputs(data.train, info["preprocessing"], Augmentation.among({**options, **tuples}))
    for part in (part for part in (data.val, data.test) if part is not None):
        set_inputs(part, info["preprocessing"])
    further = {name: options[name] for name in ("auxiliary_weight",) if name in options}
    return make_task(network, data.class_names, options["task"], info, **further)


def _refuse_difficult_alone(options: dict[str, Any], data: Splits) -> None:
    """ValueError where nothing is left to train on, since every object is marked as difficult."""
    marks = [mark for each in getattr(data.train, "objects", ()) for mark in each.difficult.tolist()]
    if marks and all(marks) and not options["difficult"]:
        raise ValueError(
            f"all {len(marks):,} objects of the training pictures are marked as difficult, and those are not trained "
            "on: --difficult true trains on them"
        )


def create_network(options: dict[str, Any], num_classes: int) -> nn.Module:
    """The network that --model, --head, --head-options, --img-size and --checkpoint describe."""
    import deltalens as dl

    size = options.get("img_size")
    if size is not None and size < 1:
        raise ValueError(f"--img-size must be positive, got {size}")
    said: dict[str, Any] = {
        "num_classes": num_classes,
        "head": options["head"],
        "head_options": options["head_options"],
        "pretrained": options["pretrained"],
        "checkpoint": options.get("checkpoint"),
    }
    try:
        return dl.create_backbone(options["model"], **said, **({} if size is None else {"img_size": size}))
    except TypeError as error:
        if size is None or "img_size" not in str(error):
            raise
        return dl.create_backbone(options["model"], **said)  # a network that takes images of any size
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{options['model']} cannot be built for --img-size {size}: {error}") from error


def measured_part(data: Splits) -> str | None:
    """The part that reports are about: "test", "val" where there is none, None where nothing is kept from training."""
    return next((part for part in ("test", "val") if getattr(data, part) is not None), None)
