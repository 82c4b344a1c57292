"""transformers' CLIPModel and SiglipModel: how their two sides are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip

from deltalens.backbones.feature_classifier import embedding_of
from deltalens.backbones.hf.clip import takes_rows
from deltalens.backbones.two_towers import TextReading, TwoTowers
from deltalens.sites.attention import Keep
from deltalens.sites.output import live
from deltalens.sites.swap import original_class


def two_towers(model: nn.Module) -> TwoTowers | None:
    """The reading of a model of transformers, None for classes without two towers."""
    cls = original_class(model)
    if issubclass(cls, clip.CLIPModel) and cls.get_text_features is clip.CLIPModel.get_text_features:
        return CLIP
    if issubclass(cls, siglip.SiglipModel) and cls.get_text_features is siglip.SiglipModel.get_text_features:
        return SIGLIP
    return None


# ------------------------------------------------------------------ steps
def _run(model: nn.Module, block: nn.Module, x: Tensor, mask: Tensor | None, keep: Keep | None) -> Tensor:
    return block(x, mask) if keep is None else block(x, mask, keep=keep)


def _causal_mask(model: nn.Module, length: int) -> Tensor:
    """Boolean for scaled_dot_product_attention, additive for the plain form."""
    like = model.text_model.embeddings.position_embedding.weight
    visible = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    if model.text_model.config._attn_implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, torch.finfo(like.dtype).min)


def _ends_of_clip(model: nn.Module, ids: Tensor) -> Tensor:
    """The library's rule: configurations from before the end token was right read the largest id."""
    end = model.text_model.eos_token_id
    return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)


def _finish_clip(model: nn.Module, rows: Tensor) -> Tensor:
    return model.text_projection(model.text_model.final_layer_norm(rows))


def _finish_siglip(model: nn.Module, rows: Tensor) -> Tensor:
    return model.text_model.head(model.text_model.final_layer_norm(rows))


def _reading(model: nn.Module, plain: type[nn.Module], **steps: Any) -> TextReading | None:
    text = model.text_model
    if original_class(text).forward is not plain.forward or text.config._attn_implementation not in ("sdpa", "eager"):
        return None
    return TextReading(
        tokens=lambda model: model.text_model.embeddings.token_embedding,
        positions=lambda model: model.text_model.embeddings.position_embedding.weight,
        blocks=lambda model: model.text_model.encoder.layers,
        run=_run,
        takes_rows=takes_rows,
        **steps,
    )


def _reading_of_clip(model: nn.Module) -> TextReading | None:
    return _reading(
        model,
        clip.CLIPTextModel,
        parts=lambda model: [model.text_model, model.text_projection],
        mask=_causal_mask,
        causal=lambda model: True,
        ends=_ends_of_clip,
        finish=_finish_clip,
    )


def _reading_of_siglip(model: nn.Module) -> TextReading | None:
    return _reading(
        model,
        siglip.SiglipTextModel,
        parts=lambda model: [model.text_model],
        mask=lambda model, length: None,
        causal=lambda model: False,
        ends=lambda model, ids: ids.new_full((len(ids),), ids.shape[1] - 1),
        finish=_finish_siglip,
    )


def _image(model: nn.Module, images: Tensor) -> Tensor:
    """(B, D), or (B, K, D) where a `pool` module reads K tokens. Earlier versions of transformers return the tensor."""
    features = model.get_image_features(images)
    return features if isinstance(features, Tensor) else features.pooler_output


def _image_of_clip(model: nn.Module, images: Tensor) -> Tensor:
    """The same; of the last block the class token's row alone, where nothing else is read."""
    if not _reads_class_row_only(model):
        return _image(model, images)
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(images))
    *earlier, last = vision.encoder.layers
    for block in earlier:
        x = block(x, None)
    x = last(x, None, keep=1)
    return model.visual_projection(vision.post_layernorm(x[:, 0]))


def _reads_class_row_only(model: nn.Module) -> bool:
    """Whether the image tower is the library's own, its last block takes rows, and no module or hook reads the tokens
    that leave it. Modules of the slot `image` act in the tower's own forward."""
    vision = model.vision_model
    own = getattr(clip, "CLIPVisionTransformer", clip.CLIPVisionModel)  # the tower itself in earlier versions
    return (
        original_class(vision).forward is own.forward
        and original_class(vision.encoder).forward is clip.CLIPEncoder.forward
        and takes_rows(vision.encoder.layers[-1])
        and not live(vision, "pool")
        and not live(vision, "image")
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (vision, vision.encoder))
    )


def _text(model: nn.Module, ids: Tensor) -> Tensor:
    return embedding_of(model.get_text_features(ids))


CLIP = TwoTowers(
    _image_of_clip,
    _text,
    lambda model: model.logit_scale.exp(),
    lambda model: None,
    _reading_of_clip,
    lambda model: model.vision_model.embeddings.class_embedding,
)
SIGLIP = TwoTowers(
    _image, _text, lambda model: model.logit_scale.exp(), lambda model: model.logit_bias, _reading_of_siglip
)
