"""Families of torchvision: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "torchvision.models.vision_transformer": ("deltalens.backbones.torchvision.vit",),
    "torchvision.models.swin_transformer": ("deltalens.backbones.torchvision.swin",),
    "torchvision.models.convnext": ("deltalens.backbones.torchvision.convnext",),
    "torchvision.models.resnet": ("deltalens.backbones.torchvision.resnet",),
}
