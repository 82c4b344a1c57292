"""The small CLIP of the reference vectors in open_clip and transformers, and its tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

VECTORS = Path(__file__).parents[1] / "../shared/reference_vectors"
NAMES = ("goldfish", "tabby_cat", "Annual Crop Land", "sports car", "people playing violin")
LAYERS, WIDTH, TEXT_WIDTH, OUT = 4, 128, 64, 32


class CutTokenizer:
    """open_clip's tokenizer with the vocabulary of the vectors: row i of the embedding is the word vocab[i]."""

    def __init__(self, vocab: Tensor | None = None):
        import open_clip

        self.full = open_clip.SimpleTokenizer()
        self.vocab = vocab

    def __call__(self, texts) -> Tensor:
        ids = self.full(texts)
        if self.vocab is None:  # words spread over 27 rows, begin and end as in the vectors
            special = (ids == 49406) * 28 + (ids == 49407) * 29
            return torch.where(special > 0, special, torch.where(ids > 0, ids % 27 + 1, 0))
        rows = torch.searchsorted(self.vocab, ids)
        known = self.vocab[rows.clamp(max=len(self.vocab) - 1)] == ids
        return torch.where(known, rows, 1)


def vocabulary() -> Tensor | None:
    file = VECTORS / "clip_inputs.safetensors"
    return load_file(file)["vocab_map"] if file.exists() else None


@functools.cache
def tokenizer() -> CutTokenizer:
    return CutTokenizer(vocabulary())


def open_clip_model(custom_text: bool = False, **text) -> nn.Module:
    """open_clip's CLIP or CustomTextCLIP with the vectors' weights; random ones where those are absent."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=LAYERS, width=WIDTH, head_width=64, patch_size=16, image_size=32)
    texts = CLIPTextCfg(context_length=77, vocab_size=30, width=TEXT_WIDTH, heads=1, layers=LAYERS, **text)
    model = (CustomTextCLIP if custom_text else CLIP)(OUT, vision, texts, quick_gelu=True)
    file = VECTORS / f"clip_tiny_{'openclip_customtext' if custom_text else 'openai'}.safetensors"
    if file.exists() and not text:
        model.load_state_dict(load_file(file))
    return model.eval()


def zero_shot(**options) -> nn.Module:
    """The small CLIP as a classifier of the vectors' five classes."""
    from deltalens.backbones.zero_shot import ZeroShotClassifier

    clip = options.pop("clip", None) or open_clip_model(options.pop("custom_text", False))
    return ZeroShotClassifier(clip, tokenizer(), options.pop("names", NAMES), **options).eval()


def vectors(name: str) -> dict[str, Tensor]:
    return load_file(VECTORS / f"{name}.safetensors")


# ------------------------------------------------------------------ transformers
def _hf_layers(theirs: dict[str, Tensor], from_prefix: str, to_prefix: str, width: int) -> dict[str, Tensor]:
    found = {}
    for i in range(LAYERS):
        old, new = f"{from_prefix}resblocks.{i}.", f"{to_prefix}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", theirs[f"{old}attn.in_proj_{kind}"].split(width), strict=True):
                found[f"{new}self_attn.{part}_proj.{kind}"] = rows.clone()
            found[f"{new}self_attn.out_proj.{kind}"] = theirs[f"{old}attn.out_proj.{kind}"]
            for ours, name in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1")):
                found[f"{new}{name}.{kind}"] = theirs[f"{old}{ours}.{kind}"]
            found[f"{new}mlp.fc2.{kind}"] = theirs[f"{old}mlp.c_proj.{kind}"]
    return found


def hf_model(**options) -> nn.Module:
    """transformers' CLIPModel with the weights of `open_clip_model()`."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"num_hidden_layers": LAYERS, "hidden_act": "quick_gelu"}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_attention_heads": 1, "vocab_size": 30}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=shared | text | {"eos_token_id": 29, "bos_token_id": 28},
        vision_config=shared | vision | {"image_size": 32, "patch_size": 16},
        projection_dim=OUT,
    )
    model, theirs = CLIPModel._from_config(config, **options).eval(), open_clip_model().state_dict()
    ours = _hf_layers(theirs, "transformer.", "text_model.", TEXT_WIDTH)
    ours |= _hf_layers(theirs, "visual.transformer.", "vision_model.", WIDTH)
    for kind in ("weight", "bias"):
        for name, old in (("text_model.final_layer_norm", "ln_final"), ("vision_model.pre_layrnorm", "visual.ln_pre")):
            ours[f"{name}.{kind}"] = theirs[f"{old}.{kind}"]
        ours[f"vision_model.post_layernorm.{kind}"] = theirs[f"visual.ln_post.{kind}"]
    embeddings = {
        "text_model.embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": theirs["positional_embedding"],
        "vision_model.embeddings.class_embedding": theirs["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": theirs["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": theirs["visual.positional_embedding"],
        "text_projection.weight": theirs["text_projection"].T.contiguous(),
        "visual_projection.weight": theirs["visual.proj"].T.contiguous(),
        "logit_scale": theirs["logit_scale"],
    }
    model.load_state_dict(ours | embeddings)
    return model
