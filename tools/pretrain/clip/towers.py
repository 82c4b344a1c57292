"""The CLIP in training: its image tower begins as vit-mini, its token table has the rows of the captions alone."""

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltalens.backbones.shipped  # noqa: F401  (registers vit-mini with timm)
from deltalens.backbones.open_clip import mini


def from_vit_mini(visual: nn.Module) -> None:
    """Give an open_clip image tower the weights of the shipped vit-mini: its features before `proj` are then timm's.

    open_clip's patch embedding has no bias: it goes into the positions of the patches.
    """
    vit = timm.create_model("deltalens_vit_mini", pretrained=True, num_classes=0)
    state = vit.state_dict()
    positions = state["pos_embed"][0].clone()
    positions[1:] += state["patch_embed.proj.bias"]
    new = {
        "conv1.weight": state["patch_embed.proj.weight"],
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": positions,
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": visual.proj.detach(),
    }
    places = {
        "norm1.": "ln_1.", "norm2.": "ln_2.", "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    }  # fmt: skip
    for block in range(len(vit.blocks)):
        for theirs, ours in places.items():
            for kind in ("weight", "bias"):
                new[f"transformer.resblocks.{block}.{ours}{kind}"] = state[f"blocks.{block}.{theirs}{kind}"]
    visual.load_state_dict(new)


class Vocabulary:
    """CLIP's tokens renumbered without those that no caption has; the order is kept, so that the end stays largest."""

    def __init__(self, texts: Sequence[str]):
        self.tokenizer = mini.tokenizer()
        self.ids = self.tokenizer(["", *texts]).unique()  # (n,) ascending; with 0, which fills a context up
        self.known: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (n, L), cut behind the longest text."""
        for text in texts:
            if text not in self.known:
                self.known[text] = torch.searchsorted(self.ids, self.tokenizer([text])[0])
        tokens = torch.stack([self.known[text] for text in texts])
        return tokens[:, : int(tokens.argmax(1).max()) + 1]


def create(vocabulary: Vocabulary) -> nn.Module:
    """The CLIP before training. Its token rows begin as the drawn ones do, so that seen and unseen ones differ by
    training alone."""
    clip = mini.untrained(len(vocabulary))
    from_vit_mini(clip.visual)
    drawn = mini.drawn_rows(mini.CONFIG["text_cfg"]["vocab_size"], mini.CONFIG["text_cfg"]["width"])
    with torch.no_grad():
        clip.token_embedding.weight.copy_(torch.from_numpy(drawn[vocabulary.ids]) * 0.02)
    return clip


def penultimate(visual: nn.Module, images: Tensor) -> Tensor:
    """Image features (B, 192) before the projection to the common space."""
    return visual._pool(visual.transformer(visual._embeds(images)))[0]


def encode_texts(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Normalised text features (T, D) of tokens (T, L) with L up to the context: `encode_text` wants it full."""
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    x = x[torch.arange(len(tokens)), tokens.argmax(1)]
    return F.normalize(x @ clip.text_projection, dim=-1)


def contrast(clip: nn.Module, images: Tensor, texts: Tensor, positives: Tensor) -> Tensor:
    """CLIP's loss with several positives: the mean of two cross-entropies with soft targets.

    images (B, D), texts (T, D), normalised; positives (B, T). The target of an image is spread evenly over the texts
    that describe it, that of a text over the images that it describes; texts that describe none are negatives only.
    """
    logits = clip.logit_scale.exp() * images @ texts.T
    wanted = positives.to(logits.dtype)
    of_images = F.cross_entropy(logits, wanted / wanted.sum(1, keepdim=True))
    used = positives.any(0)
    wanted = wanted.T[used]
    of_texts = F.cross_entropy(logits.T[used], wanted / wanted.sum(1, keepdim=True))
    return (of_images + of_texts) / 2
