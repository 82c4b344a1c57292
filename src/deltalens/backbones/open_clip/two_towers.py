"""open_clip's models of two towers: CLIP, CustomTextCLIP (SigLIP, EVA, timm trunks), CoCa as far as zero-shot goes."""

from __future__ import annotations

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltalens.backbones.open_clip.blocks import CUSTOM_TEXT_BLOCK, TEXT_BLOCK
from deltalens.backbones.two_towers import TextReading, TwoTowers
from deltalens.sites.attention import Keep
from deltalens.sites.swap import Swapped, original_class


def two_towers(model: nn.Module) -> TwoTowers | None:
    """The reading of an open_clip model with `encode_image` and `encode_text`."""
    if not all(hasattr(model, name) for name in ("encode_image", "encode_text", "logit_scale")):
        return None
    return TWO_TOWERS


def _reading(model: nn.Module) -> TextReading | None:
    """The steps of the text tower where they are open_clip's own: one stack of blocks, one position read."""
    cls = original_class(model)
    if cls.encode_text is CLIP.encode_text:
        tower, pooling = model, model.text_pool_type
    elif cls.encode_text is CustomTextCLIP.encode_text and _is_plain(model.text):
        tower, pooling = model.text, model.text.pool_type
    else:
        return None
    plain_stack = original_class(tower.transformer).forward is Transformer.forward
    return READING if plain_stack and pooling in _ENDS else None


def _is_plain(text: nn.Module) -> bool:
    return (
        isinstance(text, TextTransformer)
        and original_class(text).forward is TextTransformer.forward
        and text.cls_emb is None
        and not text.use_pad_mask
        and not text.output_tokens
    )


def _tower(model: nn.Module) -> nn.Module:
    """The module that holds embedding, blocks and projection: CLIP itself, or CustomTextCLIP's text tower."""
    return model.text if original_class(model).encode_text is CustomTextCLIP.encode_text else model


# ------------------------------------------------------------------ steps
def _parts(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    tower = _tower(model)
    if tower is not model:
        return [tower]
    found = [tower.token_embedding, tower.positional_embedding, tower.transformer, tower.ln_final]
    return found + ([] if tower.text_projection is None else [tower.text_projection])


def _run(model: nn.Module, block: nn.Module, x: Tensor, mask: Tensor | None, keep: Keep | None) -> Tensor:
    stack = _tower(model).transformer
    flip = not stack.batch_first
    x = x.transpose(0, 1) if flip else x
    options = {} if keep is None else {"keep": keep}
    if stack.grad_checkpointing and torch.is_grad_enabled():
        x = checkpoint(block, x, attn_mask=mask, use_reentrant=False, **options)
    else:
        x = block(x, attn_mask=mask, **options)
    return x.transpose(0, 1) if flip else x


def _takes_rows(block: nn.Module) -> bool:
    families = type(block)._families if isinstance(block, Swapped) else ()
    return any(family in families for family in (TEXT_BLOCK, CUSTOM_TEXT_BLOCK))


def _mask(model: nn.Module, length: int) -> Tensor | None:
    mask = _tower(model).attn_mask
    return None if mask is None else mask[:length, :length]


def _finish(model: nn.Module, rows: Tensor) -> Tensor:
    tower = _tower(model)
    rows, projection = tower.ln_final(rows), tower.text_projection
    if projection is None:
        return rows
    return projection(rows) if isinstance(projection, nn.Linear) else rows @ projection


_ENDS = {
    "argmax": lambda tower, ids: ids.argmax(-1),
    "eos": lambda tower, ids: (ids == _end_token(tower)).int().argmax(-1),
    "first": lambda tower, ids: ids.new_zeros(len(ids)),
    "last": lambda tower, ids: ids.new_full((len(ids),), ids.shape[1] - 1),
}


def _end_token(tower: nn.Module) -> int:
    return tower.eos_id if isinstance(tower, TextTransformer) else tower.text_eos_id


def _ends(model: nn.Module, ids: Tensor) -> Tensor:
    tower = _tower(model)
    return _ENDS[tower.pool_type if isinstance(tower, TextTransformer) else tower.text_pool_type](tower, ids)


READING = TextReading(
    parts=_parts,
    tokens=lambda model: _tower(model).token_embedding,
    positions=lambda model: _tower(model).positional_embedding,
    blocks=lambda model: _tower(model).transformer.resblocks,
    run=_run,
    mask=_mask,
    causal=lambda model: _tower(model).attn_mask is not None,
    ends=_ends,
    finish=_finish,
    takes_rows=_takes_rows,
)
TWO_TOWERS = TwoTowers(
    image=lambda model, images: model.encode_image(images),
    text=lambda model, ids: model.encode_text(ids),
    scale=lambda model: model.logit_scale.exp(),
    bias=lambda model: model.logit_bias,
    reading=_reading,
    class_token=lambda model: model.visual.class_embedding if isinstance(model.visual, VisionTransformer) else None,
)
