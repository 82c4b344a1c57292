"""Families of transformers: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "transformers.models.vit.modeling_vit": ("deltalens.backbones.hf.vit",),
    "transformers.models.deit.modeling_deit": ("deltalens.backbones.hf.vit",),
}
