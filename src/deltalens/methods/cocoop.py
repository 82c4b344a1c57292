"""CoCoOp (Zhou et al., Conditional prompt learning for vision-language models, CVPR 2022, arXiv 2203.05557)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting
from deltalens.methods.context import Context, first_words, text_owner


class ConditionalContext(Context):
    """`text.context`: words that each image shifts. image_width: of the shared space."""

    reads_images = True

    def __init__(self, words: Tensor, template: str, image_width: int, reduction: int):
        super().__init__(words, template)
        hidden = max(image_width // reduction, 1)
        self.meta_net = nn.Sequential()
        self.meta_net.linear1 = nn.Linear(image_width, hidden)
        self.meta_net.relu = nn.ReLU()
        self.meta_net.linear2 = nn.Linear(hidden, words.shape[-1])

    def forward(self, embedded, prompts, image_features=None):
        """(C, L, d) and normalised image features (B, D) -> (B, C, L, d)."""
        context = self.ctx + self.meta_net(image_features)[:, None]
        return self.put(embedded, context[:, None], prompts)


@register("cocoop")
class CoCoOpConfig(Method):
    """CoOp's words plus a vector that a small network makes of each image.

        ctx_i(x) = ctx_i + linear2( relu( linear1( normalize(image(x)) ) ) )   linear1 (D / 16, D), linear2 (d, D / 16)

    The text tower runs for every image: a batch of B images and C classes is B * C texts, here in one pass (the
    official code goes image by image; the result is the same). Published settings: init "a photo of a", SGD 0.002,
    batch 1, 10 epochs. Parameters: 35,360 for ViT-B/16.
    """

    learning_rate: ClassVar = 2e-3

    num_words: int = setting(default=4, help="learned words m, where there is no init")
    init: str | None = setting(default="a photo of a", help="a text whose words are the first values; null draws them")
    reduction: int = setting(default=16, help="the network's inner width is the image features' divided by this")

    def __post_init__(self):
        if self.num_words < 1 or self.reduction < 1:
            raise ValueError(f"num_words and reduction must be at least 1, got {self.num_words} and {self.reduction}")

    def place(self, anatomy):
        owner, model, reading = text_owner(anatomy, "text.context", "CoCoOp", both_ways=True)
        words, template = first_words(model, reading, self.num_words, self.init)
        yield owner, "text.context", ConditionalContext(words, template, model.width, self.reduction)
