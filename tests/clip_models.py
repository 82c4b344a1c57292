"""The small CLIP of the reference vectors in open_clip and transformers, and its tokenizer."""

from __future__ import annotations

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
