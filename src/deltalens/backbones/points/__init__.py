"""Families of point clouds: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "deltalens.models.point_transformer": ("deltalens.backbones.points.transformer",),
}
