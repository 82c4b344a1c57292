"""The point transformer of the reference vectors."""

from typing import Any

from deltalens.models.point_transformer import PointTransformer


def published_shape(config: dict[str, Any]) -> PointTransformer:
    """Of the sizes in a fixture's metadata, with random weights."""
    return PointTransformer(
        config["cls_dim"],
        dim=config["trans_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        num_groups=config["num_group"],
        group_size=config["group_size"],
        encoder_dim=config["encoder_dims"],
        drop_path=config["drop_path_rate"],
    )
