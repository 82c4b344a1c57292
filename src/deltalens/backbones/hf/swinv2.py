"""transformers' Swin v2: post-norm blocks with cosine attention in windows.

The norm follows the branch: n, what the frozen branch reads, is x itself, and the branch ends with its norm,

    x <- x + drop_path( norm_b( branch_b(x) ) ).

Prompts are keys and values of every window, un-normed, with zero bias. Tokens that live on between blocks are not
offered: the library's encoder folds the stream into a map between its stages. So VPT-shallow is refused, and the head
of VPT-deep pools the map alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.swinv2 import modeling_swinv2 as swinv2

from deltalens.backbones.hf.attention import KeysValues, joined
from deltalens.backbones.hf.swin import Grid, add_pixels, identity, per_window
from deltalens.backbones.hf.towers import Reading, classifier_family, classifier_site
from deltalens.backbones.pixels import IMAGE, through_images
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.swap import original_class, original_method


# ------------------------------------------------------------------ cosine attention with prompts
def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim). No norm comes before them."""
    attention = block.attention.self
    return _heads(attention, attention.key(prompts)), _heads(attention, attention.value(prompts))


def _position_bias(attention: nn.Module) -> Tensor:
    """(1, heads, area, area)."""
    table = attention.continuous_position_bias_mlp(attention.relative_coords_table).flatten(0, -2)
    area = attention.window_size[0] * attention.window_size[1]
    bias = table[attention.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1)
    return 16 * torch.sigmoid(bias).unsqueeze(0)


def _attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    delta_keys_values: tuple[KeysValues, ...] = (),
):
    if not delta_keys_values:
        return original_method(self, "forward")(hidden_states, attention_mask, output_attentions)
    area = hidden_states.shape[1]
    query, key, value = (_heads(self, layer(hidden_states)) for layer in (self.query, self.key, self.value))
    key, value = joined(self, key, value, delta_keys_values)
    scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
    bias = _position_bias(self)
    if attention_mask is not None:
        mask = attention_mask.unsqueeze(1).repeat(len(hidden_states) // len(attention_mask), 1, 1, 1)
        bias = bias + mask + mask  # the library adds it twice
    scores = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)) * scale
    probabilities = self.dropout((scores + F.pad(bias, (key.shape[2] - area, 0))).softmax(-1))
    y = (probabilities @ value).transpose(1, 2).flatten(2)
    return (y, probabilities[..., -area:]) if output_attentions else (y,)


def _attend(block: nn.Module, x: Tensor, grid: Grid, output_attentions: bool | None) -> tuple[Tensor, ...]:
    """Shift, partition, attend, merge, norm. x: (B, H W, C). Returns its update, and attention weights if wanted."""
    (height, width), size, batch = grid, block.window_size, len(x)
    prompts = [module(x) for module in block.delta.live("attention.prompts")]
    feature_map, _ = block.maybe_pad(x.unflatten(1, grid), height, width)
    padded_height, padded_width = feature_map.shape[1:3]
    if block.shift_size > 0:
        feature_map = torch.roll(feature_map, (-block.shift_size, -block.shift_size), (1, 2))
    windows = swinv2.window_partition(feature_map, size).flatten(1, 2)
    mask = block.get_attn_mask(padded_height, padded_width, dtype=x.dtype, device=x.device)
    if prompts:
        further = [p if isinstance(p, tuple) else prompt_keys_values(block, p) for p in prompts]
        further = tuple(per_window(pair, batch, len(windows)) for pair in further)
        outputs = block.attention.self(windows, mask, output_attentions, delta_keys_values=further)
        outputs = (block.attention.output(outputs[0], windows), *outputs[1:])
    else:
        outputs = block.attention(windows, mask, output_attentions=output_attentions)
    y = outputs[0].unflatten(1, (size, size)).contiguous()
    y = swinv2.window_reverse(y, size, padded_height, padded_width)
    if block.shift_size > 0:
        y = torch.roll(y, (block.shift_size, block.shift_size), (1, 2))
    y = y[:, :height, :width].flatten(1, 2)
    return (block.layernorm_before(y), *outputs[1:])


def _block_forward(
    self: nn.Module, hidden_states: Tensor, input_dimensions: Grid, output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    recorded = []

    def attention(x: Tensor) -> Tensor:
        update, *weights = _attend(self, x, tuple(input_dimensions), output_attentions)
        recorded.extend(weights)
        return update

    branches = (
        Branch("attention", identity, attention, self.drop_path),
        Branch("mlp", identity, lambda x: self.layernorm_after(self.output(self.intermediate(x))), self.drop_path),
    )
    layout = Tokens(prefix=0, grid=tuple(input_dimensions))
    return (residual_block(self.delta, layout, hidden_states, branches), *recorded)


_PATHS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
ATTENTION = Family(name="deltalens.backbones.hf.swinv2:ATTENTION", methods={"forward": _attention_forward})
BLOCK = Family(
    name="deltalens.backbones.hf.swinv2:BLOCK",
    methods={"forward": _block_forward},
    slots=(RESIDUAL_BLOCK_SLOTS | {"attention.prompts"}) - {"tokens.in", "tokens.out"},
    parts=lambda block: {name: Part(path) for name, path in _PATHS.items()},
    width=lambda block: block.layernorm_before.normalized_shape[0],
    keys_values=prompt_keys_values,
    readers=lambda block: {"mlp.pre": (_PATHS["fc1"],)},
    companions={"attention.self": ATTENTION},
)


# ------------------------------------------------------------------ pixels and classifier
def _patches_forward(self: nn.Module, pixel_values: Tensor):
    embeddings, grid = original_method(self, "forward")(through_images(self, pixel_values))
    self.__dict__["delta_layout"].record(*grid)
    return embeddings, grid


PATCHES = Family(name="deltalens.backbones.hf.swinv2:PATCHES", methods={"forward": _patches_forward})
PIXELS = Family(
    name="deltalens.backbones.hf.swinv2:PIXELS", methods={"forward": _patches_forward}, slots=IMAGE.slots
)  # the same reading: either may be put on top of the other


def _last_grid(model: nn.Module) -> Tokens:
    grid = model.swinv2.embeddings.patch_embeddings.__dict__["delta_layout"].grid
    for stage in model.swinv2.encoder.layers:
        grid = grid if stage.downsample is None else ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return Tokens(prefix=0, grid=grid)


CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.swinv2:CLASSIFIER",
    swinv2.Swinv2ForImageClassification,
    Reading(
        "swinv2",
        swinv2.Swinv2ImageClassifierOutput,
        lambda model, outputs: outputs.pooler_output,
        loss_options=False,
        layout=_last_grid,
    ),
)


def _family(block: nn.Module) -> Family:
    known = (
        original_class(block).forward is swinv2.Swinv2Layer.forward
        and original_class(block.attention).forward is swinv2.Swinv2Attention.forward
        and original_class(block.attention.self).forward is swinv2.Swinv2SelfAttention.forward
    )
    return BLOCK if known else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all Swin v2 blocks in the tree."""
    tower, config = Tower("vision", Tokens(0)), None
    for path, module in model.named_modules():
        config = config or getattr(module, "config", None)
        if isinstance(module, swinv2.Swinv2Layer):
            tower.add(path, module, _family(module), BLOCK.width(module), tuple(module.input_resolution))
        elif isinstance(module, swinv2.Swinv2PatchEmbeddings):
            add_pixels(tower, path, module, PATCHES, PIXELS, config)
    if tower.blocks:
        tower.classifier = classifier_site(model, {swinv2.Swinv2ForImageClassification: CLASSIFIER}, tower)
        yield "", tower
