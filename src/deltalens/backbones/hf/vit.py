"""transformers' ViT and DeiT: pre-norm blocks, class token, in DeiT a distillation token, q, k and v apart.

Images of another size need `interpolate_pos_encoding=True` in the model's call.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.deit import modeling_deit as deit
from transformers.models.vit import modeling_vit as vit

from deltalens.backbones.hf.attention import KeysValues, attend, attention_family, keys_values
from deltalens.backbones.hf.towers import Kind, Reading, classifier_family, identity, layer_parts, leave, readers
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return keys_values(block.attention, block.layernorm_before(prompts))


def _block_forward(self: nn.Module, hidden_states: Tensor, attention_mask=None, **kwargs) -> Tensor:
    def attention(normed: Tensor) -> Tensor:
        return self.dropout(attend(self, self.attention, normed, attention_mask, prompt_keys_values, **kwargs))

    branches = (
        Branch("attention", self.layernorm_before, attention, identity),
        Branch("mlp", self.layernorm_after, lambda n: self.dropout(self.mlp(n)), identity),
    )
    return leave(self, residual_block(self.delta, self.delta.layout, hidden_states, branches))


def _block(name: str, attention: Family) -> Family:
    return Family(
        name=f"deltalens.backbones.hf.vit:{name}",
        methods={"forward": _block_forward},
        slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
        parts=layer_parts("attention", "o_proj", {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
        width=lambda block: block.layernorm_before.normalized_shape[0],
        keys_values=prompt_keys_values,
        readers=readers("attention", "mlp.fc1"),
        companions={"attention": attention},
    )


ATTENTION = attention_family("deltalens.backbones.hf.vit:ATTENTION", vit)
DEIT_ATTENTION = attention_family("deltalens.backbones.hf.vit:DEIT_ATTENTION", deit)
BLOCK = _block("BLOCK", ATTENTION)
DEIT_BLOCK = _block("DEIT_BLOCK", DEIT_ATTENTION)


def _class_token(model: nn.Module, outputs) -> Tensor:
    return outputs.last_hidden_state[:, 0]


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.vit:CLASSIFIER",
    vit.ViTForImageClassification,
    Reading("vit", ImageClassifierOutput, _class_token),
)
DEIT_CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.vit:DEIT_CLASSIFIER",
    deit.DeiTForImageClassification,
    Reading("deit", ImageClassifierOutput, _class_token),
)

_LINEARS = ("attention.q_proj", "attention.o_proj", "layernorm_before", "layernorm_after", "mlp", "dropout")
KINDS = (
    Kind(
        embeddings=vit.ViTEmbeddings,
        layer=vit.ViTLayer,
        attention=vit.ViTAttention,
        attention_path="attention",
        family=BLOCK,
        prefix=lambda embeddings: 1,
        linears=_LINEARS,
        classifiers={vit.ViTForImageClassification: CLASSIFIER},
        resizable="interpolate_pos_encoding=True, which is given with every call",
    ),
    Kind(
        embeddings=deit.DeiTEmbeddings,
        layer=deit.DeiTLayer,
        attention=deit.DeiTAttention,
        attention_path="attention",
        family=DEIT_BLOCK,
        prefix=lambda embeddings: 2,
        linears=_LINEARS,
        classifiers={deit.DeiTForImageClassification: DEIT_CLASSIFIER},
        resizable="interpolate_pos_encoding=True, which is given with every call",
    ),
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """The towers of ViT and DeiT models, bare or in a classifier."""
    for kind in KINDS:
        yield from kind.find_towers(model)
