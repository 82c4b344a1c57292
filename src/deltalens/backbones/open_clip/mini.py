"""`deltalens/clip-mini`: an open_clip `CLIP` of 3.6 million parameters whose weights travel with the package.

Its image tower has the size of vit-mini, its text tower four causal blocks of width 128, and it reads CLIP's own byte
pairs in a context of 32. Those have 49,408 entries, and the texts of the training held 650 of them: only
the rows of these lie in the file. The others are drawn when the model is built, always the same, with the mean and
standard deviation of the trained ones. A word that was never seen is thus told apart from others, but means nothing to
the model until a method trains the text side. See `weights/README.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

NAME = "deltalens/clip-mini"
WEIGHTS = Path(__file__).parents[1] / "weights" / "clip-mini.safetensors"
PREPROCESSING: dict[str, Any] = {
    "size": 48,
    "mode": "RGB",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 48,
        "patch_size": 8,
        "width": 192,
        "layers": 6,
        "head_width": 32,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
TABLE = "token_embedding.weight"
ROWS, IDS, SPREAD = "token_embedding.rows", "token_embedding.ids", "token_embedding.mean_and_std"
SEED = 0


def drawn_rows(vocabulary: int, width: int) -> np.ndarray:
    """Rows (vocabulary, width) of standard normal numbers, float32: numpy keeps RandomState's stream for ever."""
    import numpy as np

    return np.random.RandomState(SEED).standard_normal((vocabulary, width)).astype(np.float32)


def packed(weights: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The state of a CLIP as the file has it: of the token table, the rows `ids` (n,), ascending, and their spread."""
    kept = {name: tensor for name, tensor in weights.items() if name != TABLE}
    rows = weights[TABLE][ids]
    spread = torch.stack([rows.mean(), rows.std()])
    return kept | {ROWS: rows, IDS: ids.to(torch.int32), SPREAD: spread}


def unpacked(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a CLIP, in float32, from that of a file: the token table is whole again."""
    weights = {name: tensor.float() for name, tensor in file.items() if name not in (ROWS, IDS, SPREAD)}
    mean, std = file[SPREAD].float().tolist()
    text = CONFIG["text_cfg"]
    table = torch.from_numpy(drawn_rows(text["vocab_size"], text["width"])) * std + mean
    table[file[IDS].long()] = file[ROWS].float()
    return weights | {TABLE: table}


def create(pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> nn.Module:
    """The CLIP, with its own weights or those of a file: a state of open_clip, or one that `packed` made.

    options: force_image_size, which interpolates the positions of the patches; TypeError for others.
    """
    from open_clip.factory import load_state_dict
    from open_clip.model import resize_pos_embed, set_model_preprocess_cfg

    options = dict(options)
    size = options.pop("force_image_size", None) or PREPROCESSING["size"]
    if options:
        raise TypeError(f"{NAME} has no options but img_size, got {', '.join(options)}")
    clip = untrained(image_size=size)
    if pretrained or checkpoint is not None:
        weights = load_state_dict(str(checkpoint or WEIGHTS), weights_only=True)
        weights = unpacked(weights) if IDS in weights else weights
        resize_pos_embed(weights, clip)
        clip.load_state_dict(weights)
    set_model_preprocess_cfg(clip, PREPROCESSING | {"size": size})
    clip.eval()
    return clip


def tokenizer() -> Any:
    """CLIP's byte pairs (open_clip.SimpleTokenizer) with the context of the text tower."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def untrained(vocabulary: int | None = None, image_size: int | None = None) -> nn.Module:
    """The CLIP with random weights. vocabulary: rows of the token table, if not CLIP's own number."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    images, texts = dict(CONFIG["vision_cfg"]), dict(CONFIG["text_cfg"])
    images |= {} if image_size is None else {"image_size": image_size}
    texts |= {} if vocabulary is None else {"vocab_size": vocabulary}
    clip: nn.Module = CLIP(CONFIG["embed_dim"], CLIPVisionCfg(**images), CLIPTextCfg(**texts))
    return clip
