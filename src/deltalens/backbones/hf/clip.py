"""The towers of transformers' CLIP, SigLIP and SigLIP 2: pre-norm blocks, in CLIP's vision tower with a class token.

In a two-tower model (CLIPModel, SiglipModel) both towers are adapted, or one with `tower="vision"`; with
`backbone="vision_model"` names count from the vision tower, and everything else is trained like a head. SigLIP 2's text
tower is left alone. Text towers take no further tokens in the stream, and no spatial modules. SigLIP 2 takes
patches of images of different shapes with a mask: a plain sequence, so that spatial modules, tokens that live on
(VPT-shallow) and prompts made of pixels are refused there.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from deltalens.backbones.hf.attention import KeysValues, attend, attention_family, keys_values
from deltalens.backbones.hf.towers import (
    EMBED_WITH_SLOT,
    POOLING_OWNER,
    Kind,
    Reading,
    classifier_family,
    identity,
    layer_parts,
    leave,
    readers,
)
from deltalens.backbones.multihead import may_keep_class_row_only
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.attention import Keep
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Words
from deltalens.sites.swap import Swapped, original_class


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return keys_values(block.self_attn, block.layer_norm1(prompts))


def _block_forward(
    self: nn.Module, hidden_states: Tensor, attention_mask=None, keep: Keep | None = None, **kwargs
) -> Tensor:
    """keep: compute these rows only, for a pooling that reads no others."""

    def attention(normed: Tensor) -> Tensor:
        return attend(self, self.self_attn, normed, attention_mask, prompt_keys_values, keep, **kwargs)

    branches = (
        Branch("attention", self.layer_norm1, attention, identity),
        Branch("mlp", self.layer_norm2, self.mlp, identity),
    )
    hidden_states = self.delta.tokens("words.in", hidden_states, self.delta.layout)
    x = residual_block(self.delta, self.delta.layout, hidden_states, branches, keep)
    return leave(self, x) if keep is None else x


def takes_rows(block: nn.Module) -> bool:
    """Whether a block is called with `keep`: it is adapted, and nothing in it reads other rows than its own."""
    known = (BLOCK, TEXT_BLOCK, SIGLIP_TEXT_BLOCK)
    return (
        isinstance(block, Swapped)
        and any(family in type(block)._families for family in known)
        and may_keep_class_row_only(block.delta)
    )


def _attention(name: str, library) -> Family:
    return attention_family(
        f"deltalens.backbones.hf.clip:{name}",
        library,
        out="out_proj",
        scaling="scale",
        dropout="dropout",
    )


_INSERTED = frozenset({"tokens.in", "tokens.out"})
_SLOTS = RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"}
_TEXT = (_SLOTS - _INSERTED) | {"words.in"}  # words are counted from the front: none are inserted, some may be replaced


def _block(name: str, attention: Family, slots: frozenset[str] = _SLOTS) -> Family:
    return Family(
        name=f"deltalens.backbones.hf.clip:{name}",
        methods={"forward": _block_forward},
        slots=slots,
        parts=layer_parts("self_attn", "out_proj", {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
        width=lambda block: block.layer_norm1.normalized_shape[0],
        keys_values=prompt_keys_values,
        readers=readers("self_attn", "mlp.fc1"),
        companions={"self_attn": attention},
    )


ATTENTION = _attention("ATTENTION", clip)
SIGLIP_ATTENTION = _attention("SIGLIP_ATTENTION", siglip)
SIGLIP2_ATTENTION = _attention("SIGLIP2_ATTENTION", siglip2)
BLOCK = _block("BLOCK", ATTENTION)
SIGLIP_BLOCK = _block("SIGLIP_BLOCK", SIGLIP_ATTENTION)
SIGLIP2_BLOCK = _block("SIGLIP2_BLOCK", SIGLIP2_ATTENTION, _SLOTS - _INSERTED)
TEXT_BLOCK = _block("TEXT_BLOCK", ATTENTION, _TEXT)
SIGLIP_TEXT_BLOCK = _block("SIGLIP_TEXT_BLOCK", SIGLIP_ATTENTION, _TEXT)


def _mean_of_patches(model: nn.Module, outputs) -> Tensor:
    return outputs.last_hidden_state[:, 1:].mean(dim=1)


def _mean(model: nn.Module, outputs) -> Tensor:
    return outputs.last_hidden_state.mean(dim=1)


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.clip:CLASSIFIER",
    clip.CLIPForImageClassification,
    Reading("vision_model", ImageClassifierOutput, _mean_of_patches, loss_options=False),
)
SIGLIP_CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.clip:SIGLIP_CLASSIFIER",
    siglip.SiglipForImageClassification,
    Reading("vision_model", ImageClassifierOutput, _mean, loss_options=False),
)

_LINEARS = ("self_attn.q_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp")
_RESIZABLE = "interpolate_pos_encoding=True, which is given with every call"
KINDS = (
    Kind(
        embeddings=clip.CLIPVisionEmbeddings,
        layer=clip.CLIPEncoderLayer,
        attention=clip.CLIPAttention,
        attention_path="self_attn",
        family=BLOCK,
        prefix=lambda embeddings: 1,
        class_token="class_embedding",
        linears=_LINEARS,
        classifiers={clip.CLIPForImageClassification: CLASSIFIER},
        resizable=_RESIZABLE,
        embed=EMBED_WITH_SLOT,
        owner=POOLING_OWNER,
    ),
    Kind(
        embeddings=siglip.SiglipVisionEmbeddings,
        layer=siglip.SiglipEncoderLayer,
        attention=siglip.SiglipAttention,
        attention_path="self_attn",
        family=SIGLIP_BLOCK,
        prefix=lambda embeddings: 0,
        linears=_LINEARS,
        classifiers={siglip.SiglipForImageClassification: SIGLIP_CLASSIFIER},
        class_token="",
        resizable=_RESIZABLE,
    ),
    Kind(
        embeddings=siglip2.Siglip2VisionEmbeddings,
        layer=siglip2.Siglip2EncoderLayer,
        attention=siglip2.Siglip2Attention,
        attention_path="self_attn",
        family=SIGLIP2_BLOCK,
        prefix=lambda embeddings: 0,
        linears=_LINEARS,
        class_token="",
    ),
)


_TEXTS = (
    (clip.CLIPTextModel, clip.CLIPEncoderLayer, clip.CLIPAttention, TEXT_BLOCK),
    (siglip.SiglipTextModel, siglip.SiglipEncoderLayer, siglip.SiglipAttention, SIGLIP_TEXT_BLOCK),
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """The vision towers of CLIP, SigLIP and SigLIP 2 models, bare, in a two-tower model, or in a classifier; and the
    text towers of CLIP and SigLIP."""
    for kind in KINDS:
        yield from kind.find_towers(model)
    for path, text in model.named_modules():
        for cls, layer, attention, family in _TEXTS:
            if isinstance(text, cls):
                yield path, _text_tower(text, layer, attention, family)


def _text_tower(text: nn.Module, layer: type, attention: type, family: Family) -> Tower:
    tower = Tower("text", Words())
    for i, block in enumerate(text.encoder.layers):
        known = (
            original_class(block).forward is layer.forward
            and original_class(block.self_attn).forward is attention.forward
        )
        width = text.config.hidden_size
        tower.add(f"encoder.layers.{i}", block, family if known else UNKNOWN_BLOCK, width)
    return tower
