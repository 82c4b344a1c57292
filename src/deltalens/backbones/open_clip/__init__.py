"""Families of open_clip: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "open_clip.timm_model": ("deltalens.backbones.open_clip.trunk",),
    "open_clip.transformer": ("deltalens.backbones.open_clip.transformer",),
    "open_clip.modified_resnet": ("deltalens.backbones.open_clip.resnet",),
}
