"""transformers' Swin: window attention on tokens (B, H W, C), the grid given with every call.

Prompts that only serve as keys and values are shared by all windows, with zero bias. Prompts that live on (VPT-shallow,
the last block of VPT-deep) stand in front of the map's tokens: each window attends with its own copy, the copies'
outputs are averaged, and patch merging tiles them to 4 C channels, as published. The head pools map and prompts; what
the model returns as hidden states is the map alone. Any image size may pad the windows with zeros behind
`attention.pre`, so that merging folds nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.swin import modeling_swin as swin

from deltalens.backbones.hf.attention import KeysValues, heads, joined, keys_values
from deltalens.backbones.hf.towers import Reading, classifier_family, classifier_site, layer_parts, pair
from deltalens.backbones.pixels import STEM, through_images
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Tokens
from deltalens.sites.swap import original_class, original_method

Grid = tuple[int, int]


# ------------------------------------------------------------------ window attention
def _attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    delta_keys_values: tuple[KeysValues, ...] = (),
    delta_carried: int = 0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Windows (B windows, carried + area, C) with further keys and values; the weights are those of the map alone."""
    if not delta_keys_values and not delta_carried:
        return original_method(self, "forward")(hidden_states, attention_mask, **kwargs)
    query, key, value = (heads(self, layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
    key, value = joined(self, key, value, delta_keys_values)
    area = hidden_states.shape[1] - delta_carried
    bias = self.relative_position_bias()
    if attention_mask is not None:
        bias = bias + attention_mask.unsqueeze(1).repeat(len(hidden_states) // len(attention_mask), 1, 1, 1)
    bias = F.pad(bias, (key.shape[2] - area, 0, delta_carried, 0))
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, swin.eager_attention_forward)
    p = self.attention_dropout if self.training else 0.0
    y, weights = interface(self, query, key, value, bias, dropout=p, scaling=self.scaling, **kwargs)
    y = self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous())
    return y, None if weights is None else weights[..., delta_carried:, -area:]


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> KeysValues:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, head_dim)."""
    return keys_values(block.attention, block.layernorm_before(prompts))


def per_window(tensors: tuple[Tensor, ...], batch: int, windows: int) -> tuple[Tensor, ...]:
    """(1 or B, heads, p, d) -> (1 or windows, heads, p, d); windows are batch-major."""
    return tuple(x if len(x) == 1 else x.repeat_interleave(windows // batch, 0) for x in tensors)


def _attend(block: nn.Module, normed: Tensor, grid: Grid, **kwargs) -> tuple[Tensor, Tensor | None]:
    """Shift, partition, attend, merge. normed: (B, carried + H W, C). Returns its update and attention weights."""
    (height, width), size, (batch, length, _) = grid, block.window_size, normed.shape
    carried = length - height * width
    x, _ = block.maybe_pad(normed[:, carried:].unflatten(1, grid), height, width)
    padded_height, padded_width = x.shape[1:3]
    windows = swin.window_partition(block.cyclic_shift(x), size).flatten(1, 2)
    mask = block.get_attn_mask(padded_height, padded_width, dtype=x.dtype, device=x.device)
    if carried:
        copies = normed[:, None, :carried].expand(-1, len(windows) // batch, -1, -1).flatten(0, 1)
        windows, kwargs["delta_carried"] = torch.cat([copies, windows], 1), carried
    prompts = [module(normed) for module in block.delta.live("attention.prompts")]
    if prompts:
        further = [p if isinstance(p, tuple) else prompt_keys_values(block, p) for p in prompts]
        kwargs["delta_keys_values"] = tuple(per_window(pair, batch, len(windows)) for pair in further)
    y, weights = block.attention(windows, mask, **kwargs)
    y = block.dropout(y)
    update = y[:, :carried].unflatten(0, (batch, -1)).mean(1) if carried else None
    y = swin.window_reverse(y[:, carried:].unflatten(1, (size, size)).contiguous(), size, padded_height, padded_width)
    y = block.cyclic_shift(y, reverse=True)[:, :height, :width].flatten(1, 2)
    return (y if update is None else torch.cat([update, y], 1)), weights


def _block_forward(
    self: nn.Module, hidden_states: Tensor, input_dimensions: Grid, always_partition: bool = False, **kwargs
) -> tuple[Tensor, Tensor | None]:
    if not always_partition:
        self.set_shift_and_window_size(input_dimensions)
    recorded = []

    def attention(normed: Tensor) -> Tensor:
        update, weights = _attend(self, normed, tuple(input_dimensions), **kwargs)
        recorded.append(weights)
        return update

    branches = (
        Branch("attention", self.layernorm_before, attention, self.drop_path),
        Branch("mlp", self.layernorm_after, lambda n: self.dropout(self.mlp(n)), identity),
    )
    layout = Tokens(prefix=0, grid=tuple(input_dimensions))
    return residual_block(self.delta, layout, hidden_states, branches), recorded[0]


def identity(x: Tensor) -> Tensor:
    return x


ATTENTION = Family(name="deltalens.backbones.hf.swin:ATTENTION", methods={"forward": _attention_forward})
BLOCK = Family(
    name="deltalens.backbones.hf.swin:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=layer_parts("attention", "o_proj", {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
    width=lambda block: block.layernorm_before.normalized_shape[0],
    keys_values=prompt_keys_values,
    readers=lambda block: {"mlp.pre": ("mlp.fc1",)},
    companions={"attention": ATTENTION},
)


# ------------------------------------------------------------------ carriers of prompts between blocks
def halved(grid: Grid) -> Grid:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _own(x: Tensor | None, grid: Grid) -> Tensor | None:
    """The map's tokens: the last H W ones."""
    return x if x is None else x[:, x.shape[1] - grid[0] * grid[1] :]


def _merging_forward(self: nn.Module, input_feature: Tensor, input_dimensions: Grid) -> Tensor:
    own = _own(input_feature, input_dimensions)
    merged = original_method(self, "forward")(own, input_dimensions)
    prompts = input_feature[:, : input_feature.shape[1] - own.shape[1]]
    if not prompts.shape[1]:
        return merged
    return torch.cat([self.reduction(self.norm(prompts.repeat(1, 1, 4))), merged], 1)


def _reshaped(self: nn.Module, hidden_states: Tensor, before: Tensor, height: int, width: int, *args, **kwargs):
    grid = (height, width)
    after = _own(hidden_states, grid if self.downsample is None else halved(grid))
    plain = original_method(self, "get_reshaped_hidden_states")
    return plain(after, _own(before, grid), height, width, *args, **kwargs)


def _grids(model: nn.Module) -> list[Grid]:
    """Grid of the patches, and of what leaves each stage."""
    stages = [stage.downsample is not None for stage in model.encoder.layers]
    first = model.embeddings.patch_embeddings.__dict__["delta_layout"].grid
    return list(accumulate(stages, lambda grid, halves: halved(grid) if halves else grid, initial=first))


def _model_forward(self: nn.Module, *args, **kwargs):
    wanted = kwargs.pop("return_dict", None)
    wanted = getattr(self.config, "return_dict", True) if wanted is None else wanted
    output = original_method(self, "forward")(*args, return_dict=True, **kwargs)
    grids = _grids(self)
    last = self.encoder.layers[-1].blocks[-1]
    if "delta" not in last._modules or not last.delta.live("tokens.kept"):
        output.last_hidden_state = _own(output.last_hidden_state, grids[-1])
    if output.hidden_states is not None:
        pairs = zip(output.hidden_states, grids, strict=True)
        output.hidden_states = tuple(_own(x, grid) for x, grid in pairs)
    return output if wanted else output.to_tuple()


MERGING = Family(name="deltalens.backbones.hf.swin:MERGING", methods={"forward": _merging_forward})
STAGE = Family(name="deltalens.backbones.hf.swin:STAGE", methods={"get_reshaped_hidden_states": _reshaped})
MODEL = Family(name="deltalens.backbones.hf.swin:MODEL", methods={"forward": _model_forward})


# ------------------------------------------------------------------ pixels and classifier
def _patches_forward(self: nn.Module, pixel_values: Tensor):
    embeddings, grid = original_method(self, "forward")(through_images(self, pixel_values))
    self.__dict__["delta_layout"].record(*grid)
    return embeddings, grid


PATCHES = Family(name="deltalens.backbones.hf.swin:PATCHES", methods={"forward": _patches_forward})
IMAGE = Family(
    name="deltalens.backbones.hf.swin:IMAGE", methods={"forward": _patches_forward}, slots=frozenset({"image"})
)  # the same reading: either may be put on top of the other
CLASSIFIER = classifier_family(
    "deltalens.backbones.hf.swin:CLASSIFIER",
    swin.SwinForImageClassification,
    Reading(
        "swin",
        swin.SwinImageClassifierOutput,
        lambda model, outputs: outputs.pooler_output,
        layout=lambda model: Tokens(prefix=0, grid=_grids(model.swin)[-1]),
    ),
)


def add_pixels(tower: Tower, path: str, patches: nn.Module, embed: Family, image: Family, config) -> None:
    """Where the pixels enter a Swin: patch embedding and its convolution."""
    conv, width = patches.projection, patches.projection.out_channels
    tower.patch_size, tower.image_size = tuple(conv.kernel_size), pair(config.image_size)
    tower.embed = Site(path, patches, embed, width, tower=tower)
    tower.image = Site(path, patches, image, width, tower=tower)
    tower.stem = Site(f"{path}.projection", conv, STEM, width, tower=tower)
    if config.use_absolute_embeddings:
        tower.resizable = "interpolate_pos_encoding=True, which is given with every call"


def _family(block: nn.Module) -> Family:
    known = (
        original_class(block).forward is swin.SwinLayer.forward
        and original_class(block.attention).forward is swin.SwinAttention.forward
        and all(hasattr(block, name) for name in ("cyclic_shift", "set_shift_and_window_size", "mlp", "dropout"))
        and hasattr(block.attention, "q_proj")
    )
    return BLOCK if known else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower for every SwinModel in the tree."""
    for start, owner in model.named_modules():
        if not isinstance(owner, swin.SwinModel):
            continue
        tower, prefix = Tower("vision", Tokens(0)), f"{start}." if start else ""
        for name, module in owner.named_modules():
            path, width = f"{prefix}{name}".rstrip("."), owner.config.embed_dim
            if isinstance(module, swin.SwinLayer):
                family = _family(module)
                tower.add(path, module, family, BLOCK.width(module), tuple(module.input_resolution))
            elif isinstance(module, swin.SwinPatchMerging):
                tower.carriers.append(Site(path, module, MERGING, width, tower=tower))
            elif isinstance(module, swin.SwinStage):
                tower.carriers.append(Site(path, module, STAGE, width, tower=tower))
            elif isinstance(module, swin.SwinPatchEmbeddings):
                add_pixels(tower, path, module, PATCHES, IMAGE, owner.config)
                tower.resizable = "timm: the windows of transformers' Swin stay as small as the smallest map they saw"
        tower.carriers.append(Site(start, owner, MODEL, owner.num_features, tower=tower))
        tower.classifier = classifier_site(model, {swin.SwinForImageClassification: CLASSIFIER}, tower)
        yield "", tower
