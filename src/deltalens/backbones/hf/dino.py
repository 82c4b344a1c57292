"""transformers' DINOv2, with registers or without, and the ViTs of DINOv3: LayerScale, plain or gated MLPs.

DINOv3 rotates queries and keys of patches; class token, registers and tokens that adapters add are not rotated, and
neither are prompts. In gated MLPs `fc1_g` is the gate, `fc1_x` what it opens, `fc2` the way back. DINOv2's head reads
the class token beside the mean of the patches, so that its classifier offers `output` and no `pool`; DINOv3 has no
classifier.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3

from deltalens.backbones.hf.attention import KeysValues, attend, attention_family, keys_values
from deltalens.backbones.hf.towers import Kind, Reading, classifier_family, layer_parts, leave, readers
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return keys_values(block.attention, block.norm1(prompts))


def _block_forward(self: nn.Module, hidden_states: Tensor, attention_mask=None, **kwargs) -> Tensor:
    def attention(normed: Tensor) -> Tensor:
        return self.layer_scale1(attend(self, self.attention, normed, attention_mask, prompt_keys_values, **kwargs))

    branches = (
        Branch("attention", self.norm1, attention, self.drop_path),
        Branch("mlp", self.norm2, lambda n: self.layer_scale2(self.mlp(n)), self.drop_path),
    )
    return leave(self, residual_block(self.delta, self.delta.layout, hidden_states, branches))


_PLAIN = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_GATED = {"fc1_g": "mlp.gate_proj", "fc1_x": "mlp.up_proj", "fc2": "mlp.down_proj"}


def _mlp(block: nn.Module) -> dict[str, str]:
    """Part -> path of the MLP's layers. DINOv3's plain MLP has the names of a gated one without its gate."""
    if hasattr(block.mlp, "fc1"):
        return _PLAIN
    return _GATED if hasattr(block.mlp, "gate_proj") else {"fc1": "mlp.up_proj", "fc2": "mlp.down_proj"}


def _readers(block: nn.Module) -> dict[str, tuple[str, ...]]:
    return readers("attention", *(path for part, path in _mlp(block).items() if part != "fc2"))(block)


def _block(name: str, attention: Family) -> Family:
    return Family(
        name=f"deltalens.backbones.hf.dino:{name}",
        methods={"forward": _block_forward},
        slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
        parts=lambda block: layer_parts("attention", "o_proj", _mlp(block))(block),
        width=lambda block: block.norm1.normalized_shape[0],
        keys_values=prompt_keys_values,
        readers=_readers,
        companions={"attention": attention},
    )


ATTENTION = attention_family("deltalens.backbones.hf.dino:ATTENTION", dinov2)
REGISTERS_ATTENTION = attention_family("deltalens.backbones.hf.dino:REGISTERS_ATTENTION", registers)
V3_ATTENTION = attention_family(
    "deltalens.backbones.hf.dino:V3_ATTENTION",
    dinov3,
    dropout="dropout",
    rotate=dinov3.apply_rotary_pos_emb,
)
BLOCK = _block("BLOCK", ATTENTION)
REGISTERS_BLOCK = _block("REGISTERS_BLOCK", REGISTERS_ATTENTION)
V3_BLOCK = _block("V3_BLOCK", V3_ATTENTION)


def _class_and_mean(model: nn.Module, outputs) -> Tensor:
    tokens, prefix = outputs.last_hidden_state, 1 + getattr(model.config, "num_register_tokens", 0)
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.dino:CLASSIFIER",
    dinov2.Dinov2ForImageClassification,
    Reading("dinov2", ImageClassifierOutput, _class_and_mean, of_pooled=None),
)
REGISTERS_CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.dino:REGISTERS_CLASSIFIER",
    registers.Dinov2WithRegistersForImageClassification,
    Reading("dinov2_with_registers", ImageClassifierOutput, _class_and_mean, of_pooled=None),
)

_LINEARS = ("attention.q_proj", "attention.o_proj", "norm1", "norm2", "layer_scale1", "layer_scale2", "mlp")


def _with_registers(embeddings: nn.Module) -> int:
    return 1 + embeddings.register_tokens.shape[1]


KINDS = (
    Kind(
        embeddings=dinov2.Dinov2Embeddings,
        layer=dinov2.Dinov2Layer,
        attention=dinov2.Dinov2Attention,
        attention_path="attention",
        family=BLOCK,
        prefix=lambda embeddings: 1,
        linears=_LINEARS,
        recorder="encoder",
        classifiers={dinov2.Dinov2ForImageClassification: CLASSIFIER},
    ),
    Kind(
        embeddings=registers.Dinov2WithRegistersEmbeddings,
        layer=registers.Dinov2WithRegistersLayer,
        attention=registers.Dinov2WithRegistersAttention,
        attention_path="attention",
        family=REGISTERS_BLOCK,
        prefix=_with_registers,
        linears=_LINEARS,
        recorder="encoder",
        classifiers={registers.Dinov2WithRegistersForImageClassification: REGISTERS_CLASSIFIER},
    ),
    Kind(
        embeddings=dinov3.DINOv3ViTEmbeddings,
        layer=dinov3.DINOv3ViTLayer,
        attention=dinov3.DINOv3ViTAttention,
        attention_path="attention",
        family=V3_BLOCK,
        prefix=_with_registers,
        linears=_LINEARS,
        recorder="model",
    ),
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """The towers of DINOv2 and DINOv3 models: bare, as Backbone, or in a classifier."""
    for kind in KINDS:
        yield from kind.find_towers(model)
