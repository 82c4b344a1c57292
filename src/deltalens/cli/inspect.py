"""Show what a method would do to a model, before training and without downloading weights.

Of a repository on the Hugging Face Hub the configuration is fetched, which is small. With --head the backbone is shown
under a dense head (upernet, retinanet, cascade...), which is trained and counted as head.

For every block: the slots that are used and the tensors that go there, with shapes; then the counts with and without
head. With --templates the classes are texts, and image tower and text tower are shown with what goes around them.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

from deltalens.cli import dense_options, method_options
from deltalens.cli.method_options import MODEL_HELP, add_method_argument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from deltalens.sites.anatomy import Anatomy, Site, Tower


def translate(argv: list[str]) -> list[str]:
    """Gather the --method words and those of --head."""
    return dense_options.translate(method_options.translate(argv))


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", type=str, default="deltalens/vit-mini", help=MODEL_HELP)
    add(
        "--templates",
        type=list[str] | str | None,
        default=None,
        help="make the classes texts, as in CLIP: 'a photo of a {}.', or a list of such; for models with a text tower",
    )
    add("--tower", type=str | None, default=None, help="adapt only this tower of a model with several: vision, text")
    add_method_argument(parser)
    add(
        "--num-classes",
        type=int | None,
        default=None,
        help="classes of the head, by default the model's own; with --templates as many names, by default 2; with "
        "--head by default 20, without the background",
    )
    add("--head", type=str | None, default=None, help="a dense head; its settings follow as --head.SETTING VALUE")
    add("--head-options", type=dict | None, default=None, help="the head's settings as one mapping")
    add("--img-size", type=int | None, default=None, help="input size in pixels, where the model allows another")
    add("--tensors", type=bool, default=False, help="also list every trained tensor with its shape")


def run(args: Namespace) -> None:
    """Attach to the untrained architecture and print."""
    import deltalens as dl
    from deltalens.backbones.preprocessing import input_in_words
    from deltalens.cli.method_options import read_methods
    from deltalens.cli.sized_backbone import create_sized_backbone

    methods = read_methods(args.method)
    if args.head is not None:
        model, preprocessing = _dense(args)
    elif args.head_options:
        raise ValueError("--head-options were given without --head: name one, such as --head upernet")
    elif args.templates is None:
        model, preprocessing = create_sized_backbone(args.model, args.num_classes, args.img_size, pretrained=False)
    else:
        names = [f"class {i + 1}" for i in range(2 if args.num_classes is None else args.num_classes)]
        texts = {"class_names": names, "templates": args.templates}
        model, preprocessing = create_sized_backbone(args.model, None, args.img_size, pretrained=False, **texts)
    anatomy = dl.describe(model, only=args.tower)
    dl.attach(model, methods, tower=args.tower)
    print(f"model     {args.model} ({type(model).__name__}), input {input_in_words(preprocessing)}")
    for method in methods:
        print(f"method    {method}")
    for tower in anatomy.towers:
        _print_tower(tower)
    around = sorted({slot for tower in anatomy.towers for site in _around(tower) for slot in site.slots})
    if args.templates is not None:
        _print_wrapped(f"slots     offered by the classifier around them: {', '.join(around)}")
    print()
    for line in _inserted(model, anatomy):
        print(line)
    for line in _replaced(model):
        print(line)
    if args.tensors:
        print("\ntrained tensors")
        for row in dl.parameter_table(model):
            print(f"  {row.kind:<9} {row.numel:>11,}  {row.name} {row.shape}")
    _print_counts(model)


def _dense(args: Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """(network for dense prediction, its preprocessing)."""
    import deltalens as dl
    from deltalens.cli.dense_training import create_network

    if args.templates is not None:
        raise ValueError("--templates make the classes texts, which a dense head does not have: leave them out")
    named = {"model": args.model, "img_size": args.img_size, "head": args.head, "head_options": args.head_options}
    model = create_network({**named, "pretrained": False}, 20 if args.num_classes is None else args.num_classes)
    return model, dl.preprocessing(model)


def _print_tower(tower: Tower) -> None:
    """Its blocks, and the slots that they offer."""
    widths, layout = sorted({site.width for site in tower.blocks}), type(tower.layout).__name__
    print(f"tower     {tower.name}: {len(tower.blocks)} blocks, widths {', '.join(map(str, widths))}, layout {layout}")
    offered = [tuple(sorted(site.slots)) for site in tower.blocks]
    for slots in sorted(set(offered)):
        _print_wrapped(f"slots     offered by {offered.count(slots)} blocks: {', '.join(slots)}")


def _print_wrapped(text: str) -> None:
    print("\n".join(textwrap.wrap(text, 118, subsequent_indent=" " * 10)))


def _around(tower: Tower) -> list[Site]:
    """The classifier's places: its slots are not those of blocks."""
    return [site for site in (tower.owner, tower.classifier) if site is not None and not site.path]


def _offered(anatomy: Anatomy) -> dict[str, list[str]]:
    """Path of a block, or of what lies around the blocks -> the slots there."""
    found: dict[str, set[str]] = {}
    for tower in anatomy.towers:
        around = (tower.embed, tower.owner, tower.classifier, tower.image, tower.stem)
        for site in (*tower.blocks, *(site for site in around if site is not None)):
            found[site.path] = found.get(site.path, set()) | site.slots
    return {path: sorted(slots) for path, slots in found.items()}


def _inserted(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The inserted modules by block and slot; blocks of a tower where they are the same are said once."""
    from deltalens.lifecycle.state import all_slots, state_of

    offered = _offered(anatomy)
    tower_of = {site.path: tower.name for tower in anatomy.towers for site in tower.blocks}
    placed = [module for _, slots in all_slots(model) for _, module in slots.of("default")]
    users = Counter(id(parameter) for module in placed for parameter in module.parameters())
    found: dict[tuple[str, ...], list[str]] = {}  # a tower's name and lines -> blocks
    for owner, slots in all_slots(model):
        for place, module in slots.of("default"):
            block = max((path for path in offered if _lies_in(owner, path)), key=len, default=owner)
            key, _, method = place.rpartition(".")
            slot = next((name for name in offered.get(block, ()) if name.replace(".", "_") == key), f"weights:{key}")
            count = sum(parameter.numel() for parameter in module.parameters())
            shared = sum(parameter.numel() for parameter in module.parameters() if users[id(parameter)] > 1)
            title = f"{slot:<22} {method}: {type(module).__name__}, {count:,} parameters"
            title += f", {shared:,} of them shared with another place" if shared else ""
            lines = (tower_of.get(block, ""), f"    {title}", *_tensors(module.named_parameters()))
            found.setdefault(lines, []).append(block)
    for wrapping in state_of(model).active_wrappings():
        own = {id(parameter) for parameter in wrapping.parameters() if parameter.requires_grad}
        for path, layer in wrapping.layers.items():
            block = max((each for each in tower_of if path.startswith(f"{each}.")), key=len, default="")
            tensors = [(name, parameter) for name, parameter in layer.named_parameters() if id(parameter) in own]
            count = sum(parameter.numel() for _, parameter in tensors)
            place = "around " + path.removeprefix(f"{block}.")
            title = f"{place:<22} {wrapping.method}: {type(layer).__name__}, {count:,} parameters"
            found.setdefault((tower_of.get(block, ""), f"    {title}", *_tensors(tensors)), []).append(block or path)
    by_blocks: dict[tuple[str, ...], list[str]] = {}
    for said, blocks in found.items():
        by_blocks.setdefault(tuple(blocks), []).extend(said[1:])
    return [line for blocks, lines in by_blocks.items() for line in (_range(blocks), *lines)] or ["nothing is inserted"]


def _lies_in(owner: str, path: str) -> bool:
    """Whether a module is the one at the path, or inside it; what is inside of the model is not the model's own."""
    return owner == path or bool(path and owner.startswith(f"{path}."))


def _tensors(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    text = "; ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters)
    return textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _replaced(model: nn.Module) -> list[str]:
    """Unfrozen tensors and the head, in a line each."""
    import deltalens as dl

    lines = []
    for kind in ("unfrozen", "head"):
        rows = [row for row in dl.parameter_table(model) if row.kind == kind]
        if rows:
            more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
            shown = "; ".join(f"{row.name} {row.shape}" for row in rows[:4])
            lines += [
                f"{kind}: {len(rows)} tensors, {sum(row.numel for row in rows):,} parameters",
                f"        {shown}{more}",
            ]
    return lines


def _range(blocks: Sequence[str]) -> str:
    if not blocks[0]:
        return "around the towers"
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]} ({len(blocks)} blocks)"


def _print_counts(model: nn.Module) -> None:
    import deltalens as dl

    count: Any = dl.count_parameters(model)
    print()
    print(f"backbone              {count.backbone:>13,} parameters, frozen but for what the method unfreezes")
    print(f"trained without head  {count.adapter:>13,}  {count.percent:8.3f} % of the backbone")
    print(f"trained with head     {count.trainable:>13,}  {count.percent_with_head:8.3f} %")
