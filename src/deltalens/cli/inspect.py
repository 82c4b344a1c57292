"""Show what a method would do to a model, before training and without downloading weights.

Of a repository on the Hugging Face Hub the configuration is fetched, which is small.

For every block: the slots that are used and the tensors that go there, with shapes; then the counts with and without
head.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from deltalens.cli.method_options import MODEL_HELP, add_method_argument, translate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

__all__ = ["add_arguments", "run", "translate"]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", type=str, default="deltalens/vit-mini", help=MODEL_HELP)
    add_method_argument(parser)
    add("--num-classes", type=int | None, default=None, help="classes of the head; by default the model's own")
    add("--img-size", type=int | None, default=None, help="input size in pixels, where the model allows another")
    add("--tensors", type=bool, default=False, help="also list every trained tensor with its shape")


def run(args: Namespace) -> None:
    """Attach to the untrained architecture and print."""
    import deltalens as dl
    from deltalens.cli.method_options import read_methods
    from deltalens.cli.sized_backbone import create_sized_backbone

    methods = read_methods(args.method)
    model, preprocessing = create_sized_backbone(args.model, args.num_classes, args.img_size, pretrained=False)
    anatomy = dl.describe(model)
    offered = {site.path: sorted(site.slots) for site in anatomy.blocks()}
    dl.attach(model, methods)
    print(f"model     {args.model} ({type(model).__name__}), input {'x'.join(map(str, preprocessing['input_size']))}")
    for method in methods:
        print(f"method    {method}")
    for tower in anatomy.towers:
        widths = sorted({site.width for site in tower.blocks})
        layout = type(tower.layout).__name__
        print(
            f"tower     {tower.name}: {len(tower.blocks)} blocks, widths {', '.join(map(str, widths))}, layout {layout}"
        )
    for slots in sorted({tuple(slots) for slots in offered.values()}):
        count = sum(tuple(each) == slots for each in offered.values())
        text = f"slots     offered by {count} blocks: {', '.join(slots)}"
        print("\n".join(textwrap.wrap(text, 118, subsequent_indent=" " * 10)))
    print()
    for line in _inserted(model, offered):
        print(line)
    for line in _replaced(model):
        print(line)
    if args.tensors:
        print("\ntrained tensors")
        for row in dl.parameter_table(model):
            print(f"  {row.kind:<9} {row.numel:>11,}  {row.name} {row.shape}")
    _print_counts(model)


def _inserted(model: nn.Module, offered: dict[str, list[str]]) -> list[str]:
    """The inserted modules by block and slot; blocks where they are the same are said once."""
    from deltalens.lifecycle.state import all_slots, state_of

    found: dict[tuple[str, ...], list[str]] = {}
    for owner, slots in all_slots(model):
        for place, module in slots.of("default"):
            block = max((path for path in offered if f"{owner}.".startswith(f"{path}.")), key=len, default=owner)
            key, _, method = place.rpartition(".")
            slot = next((name for name in offered.get(block, ()) if name.replace(".", "_") == key), f"weights:{key}")
            count = sum(parameter.numel() for parameter in module.parameters())
            title = f"{slot:<22} {method}: {type(module).__name__}, {count:,} parameters"
            found.setdefault((f"    {title}", *_tensors(module.named_parameters())), []).append(block)
    for wrapping in state_of(model).active_wrappings():
        own = {id(parameter) for parameter in wrapping.parameters() if parameter.requires_grad}
        for path, layer in wrapping.layers.items():
            block = max((each for each in offered if path.startswith(f"{each}.")), key=len, default="")
            tensors = [(name, parameter) for name, parameter in layer.named_parameters() if id(parameter) in own]
            count = sum(parameter.numel() for _, parameter in tensors)
            place = "around " + path.removeprefix(f"{block}.")
            title = f"{place:<22} {wrapping.method}: {type(layer).__name__}, {count:,} parameters"
            found.setdefault((f"    {title}", *_tensors(tensors)), []).append(block or path)
    by_blocks: dict[tuple[str, ...], list[str]] = {}
    for lines, blocks in found.items():
        by_blocks.setdefault(tuple(blocks), []).extend(lines)
    return [line for blocks, lines in by_blocks.items() for line in (_range(blocks), *lines)] or ["nothing is inserted"]


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


def _range(blocks: list[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]} ({len(blocks)} blocks)"


def _print_counts(model: nn.Module) -> None:
    import deltalens as dl

    count: Any = dl.count_parameters(model)
    print()
    print(f"backbone              {count.backbone:>13,} parameters, frozen but for what the method unfreezes")
    print(f"trained without head  {count.adapter:>13,}  {count.percent:8.3f} % of the backbone")
    print(f"trained with head     {count.trainable:>13,}  {count.percent_with_head:8.3f} %")
