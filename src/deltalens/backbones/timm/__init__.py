"""Families of timm: module in which a block's class is defined -> the files that know it."""

FAMILIES = {
    "timm.models.vision_transformer": ("deltalens.backbones.timm.vit",),
    "timm.models.swin_transformer": ("deltalens.backbones.timm.swin",),
    "timm.models.swin_transformer_v2": ("deltalens.backbones.timm.swin_v2",),
    "timm.models.swin_transformer_v2_cr": ("deltalens.backbones.timm.swin_v2_cr",),
    "timm.models.hiera": ("deltalens.backbones.timm.hiera",),
    "timm.models.hieradet_sam2": ("deltalens.backbones.timm.hieradet_sam2",),
    "timm.models.cait": ("deltalens.backbones.timm.cait",),
    "timm.models.xcit": ("deltalens.backbones.timm.xcit",),
    "timm.models.convnext": ("deltalens.backbones.timm.convnext",),
    "timm.models.resnet": ("deltalens.backbones.timm.resnet",),
    "timm.models.resnetv2": ("deltalens.backbones.timm.resnetv2",),
    "timm.models.regnet": ("deltalens.backbones.timm.regnet",),
    "timm.models._efficientnet_blocks": ("deltalens.backbones.timm.efficientnet",),
    "timm.models.metaformer": ("deltalens.backbones.timm.metaformer",),
    "timm.models.maxxvit": ("deltalens.backbones.timm.maxvit",),
    "timm.models.fastvit": ("deltalens.backbones.timm.fastvit",),
    "timm.models.eva": ("deltalens.backbones.timm.eva",),
    "timm.models.beit": ("deltalens.backbones.timm.beit",),
    "timm.models.vision_transformer_relpos": ("deltalens.backbones.timm.relpos",),
    "timm.models.vision_transformer_sam": ("deltalens.backbones.timm.sam",),
}
