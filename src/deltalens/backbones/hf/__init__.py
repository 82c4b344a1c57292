"""Families of transformers: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "transformers.models.vit.modeling_vit": ("deltalens.backbones.hf.vit",),
    "transformers.models.deit.modeling_deit": ("deltalens.backbones.hf.vit",),
    "transformers.models.dinov2.modeling_dinov2": ("deltalens.backbones.hf.dino",),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": ("deltalens.backbones.hf.dino",),
    "transformers.models.dinov3_vit.modeling_dinov3_vit": ("deltalens.backbones.hf.dino",),
    "transformers.models.clip.modeling_clip": ("deltalens.backbones.hf.clip",),
    "transformers.models.siglip.modeling_siglip": ("deltalens.backbones.hf.clip",),
    "transformers.models.siglip2.modeling_siglip2": ("deltalens.backbones.hf.clip",),
    "transformers.models.beit.modeling_beit": ("deltalens.backbones.hf.beit",),
    "transformers.models.convnext.modeling_convnext": ("deltalens.backbones.hf.convnext",),
    "transformers.models.convnextv2.modeling_convnextv2": ("deltalens.backbones.hf.convnext",),
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext": ("deltalens.backbones.hf.convnext",),
    "transformers.models.swin.modeling_swin": ("deltalens.backbones.hf.swin",),
    "transformers.models.swinv2.modeling_swinv2": ("deltalens.backbones.hf.swinv2",),
}
