"""transformers' BEiT: relative-position bias (zero for prompts and added tokens), LayerScale as plain parameters.

Adapters may add tokens: the bias is that of the backbone's own tokens. With mean pooling the last norm sits behind the
pooling, and a `pool` module's features go through it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.beit import modeling_beit as beit

from deltalens.backbones.hf.attention import KeysValues, attend, attention_family, keys_values
from deltalens.backbones.hf.towers import Kind, Reading, classifier_family, layer_parts, leave, readers
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Un-normed prompts (1 or B, p, C) -> their keys and values, each (1 or B, heads, p, head_dim)."""
    return keys_values(block.attention, block.layernorm_before(prompts))


def _with_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """The bias where a mask lets see. transformers makes a boolean mask of nothing hidden when a model is exported."""
    if mask.dtype != torch.bool:
        return bias + mask
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)


def _block_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask=None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
    **kwargs,
) -> Tensor:
    layout = self.delta.layout
    if self.relative_position_bias is not None:
        grid = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
        own = layout.prefix + grid[0] * grid[1]
        bias = self.relative_position_bias(grid, interpolate_pos_encoding, dim_size=own)
        attention_mask = bias if attention_mask is None else _with_mask(bias, attention_mask)

    def attention(normed: Tensor) -> Tensor:
        y = attend(self, self.attention, normed, attention_mask, prompt_keys_values, **kwargs)
        return self.lambda_1 * self.dropout(y)

    branches = (
        Branch("attention", self.layernorm_before, attention, self.drop_path),
        Branch("mlp", self.layernorm_after, lambda n: self.lambda_2 * self.dropout(self.mlp(n)), self.drop_path),
    )
    return leave(self, residual_block(self.delta, layout, hidden_states, branches))


ATTENTION = attention_family("deltalens.backbones.hf.beit:ATTENTION", beit)
BLOCK = Family(
    name="deltalens.backbones.hf.beit:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts", "attention.mask"},
    parts=layer_parts("attention", "o_proj", {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
    width=lambda block: block.layernorm_before.normalized_shape[0],
    keys_values=prompt_keys_values,
    readers=readers("attention", "mlp.fc1"),
    companions={"attention": ATTENTION},
)


def _through_last_norm(model: nn.Module, features: Tensor) -> Tensor:
    norm = model.beit.pooler.layernorm
    return features if norm is None else norm(features)


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.beit:CLASSIFIER",
    beit.BeitForImageClassification,
    Reading(
        "beit",
        ImageClassifierOutput,
        lambda model, outputs: outputs.pooler_output,
        of_pooled=_through_last_norm,
        loss_options=False,
    ),
)

KIND = Kind(
    embeddings=beit.BeitEmbeddings,
    layer=beit.BeitLayer,
    attention=beit.BeitAttention,
    attention_path="attention",
    family=BLOCK,
    prefix=lambda embeddings: 1,
    linears=("attention.q_proj", "attention.o_proj", "layernorm_before", "layernorm_after", "mlp", "dropout"),
    classifiers={beit.BeitForImageClassification: CLASSIFIER},
)


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """The towers of BEiT models: bare, as Backbone, in a classifier or a segmenter."""
    yield from KIND.find_towers(model)
