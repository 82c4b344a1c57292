"""`deltalens analyze experts`: which experts of Adapter-X the blocks and the classes use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import Namespace


def run_experts(args: Namespace, batches: Callable[..., Any]) -> None:
    """Count, print the warnings, write figure and CSV. batches: (args, model, class names, most images) -> loader."""
    import deltalens as dl
    from deltalens.cli.trained import label_of, load_trained
    from deltalens.data.inputs import IMAGES, kind_of
    from deltalens.methods.expert_use import expert_use
    from deltalens.studies.expert_pictures import write_experts
    from deltalens.studies.figure import check_kind

    check_kind(args.output)
    if len(args.adapters) > 1:
        raise ValueError(f"experts takes one adapter, got {len(args.adapters)}")
    (folder,) = args.adapters
    model, class_names, _ = load_trained(folder, args.device)
    loader = batches(args, model, class_names, args.images)
    use = expert_use(model, loader, len(class_names))
    file = write_experts(use, class_names, label_of(model, folder), args.output)
    for pool in sorted(set(use.pools)):
        shares = ", ".join(f"{100 * share:.1f}" for share in use.of_pool(pool).tolist())
        blocks = sum(each == pool for each in use.pools)
        print(f"pool {pool}, {blocks} block{'s' * (blocks > 1)}: {shares} % of sub-tokens")
    for text in use.warnings():
        print(f"warning: {text}")
    counted = "images" if kind_of(dl.preprocessing(model)) == IMAGES else "clouds"
    print(f"{len(loader.dataset)} {counted}; drawn in {args.output}; numbers in {file}")
