"""Families of timm: module in which a block's class is defined -> the files that know it."""

FAMILIES = {
    "timm.models.vision_transformer": ("deltalens.backbones.timm.vit",),
    "timm.models.swin_transformer": ("deltalens.backbones.timm.swin",),
    "timm.models.convnext": ("deltalens.backbones.timm.convnext",),
    "timm.models.eva": ("deltalens.backbones.timm.eva",),
    "timm.models.beit": ("deltalens.backbones.timm.beit",),
    "timm.models.vision_transformer_relpos": ("deltalens.backbones.timm.relpos",),
    "timm.models.vision_transformer_sam": ("deltalens.backbones.timm.sam",),
}
