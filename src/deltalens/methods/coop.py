"""CoOp (Zhou et al., Learning to prompt for vision-language models, IJCV 2022, arXiv 2109.01134)."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.methods.context import POSITIONS, Context, first_words, text_owner


@register("coop")
class CoOpConfig(Method):
    """Learned words in the place of "a photo of a"; everything else of the two towers is frozen.

        text of class c = start, ctx_1 ... ctx_m, name of c, ".", end          ctx (m, d), or (C, m, d) per class

    Words begin as N(0, 0.02), or as those of `init` ("a photo of a"), whose number is then m. The words of all classes
    in common work for classes that were not trained; words per class do not.

    Published settings: m = 16 words at the end, SGD 0.002, batch 32, 200 epochs (50 on ImageNet, or with fewer shots);
    in the tables of CoCoOp and later papers init = "a photo of a" (`CoOpConfig.base_to_novel()`). Parameters: m d,
    2,048 for m = 4 and d = 512.
    """

    learning_rate: ClassVar = 2e-3
    context: ClassVar[type[Context]] = Context

    num_words: int = setting(default=16, help="learned words m, where there is no init")
    init: str | None = setting(default=None, help='a text whose words are the first values, such as "a photo of a"')
    position: str = setting(default="end", help="where the name stands", choices=POSITIONS)
    per_class: bool = setting(default=False, help="words of its own for each class")

    @classmethod
    def base_to_novel(cls) -> CoOpConfig:
        """The CoOp of CoCoOp's and later papers' tables: 4 words that begin as "a photo of a"."""
        return cls(init="a photo of a")

    def __post_init__(self):
        check_choices(self)
        if self.num_words < 1:
            raise ValueError(f"num_words must be at least 1, got {self.num_words}")

    def place(self, anatomy):
        owner, model, reading = text_owner(
            anatomy, "text.context", type(self).__name__.removesuffix("Config"), both_ways=True
        )
        classes = model.num_classes if self.per_class else None
        words, template = first_words(model, reading, self.num_words, self.init, classes)
        context = self.context(words, template, self.position)
        context.classes = model.class_names if self.per_class else None
        yield owner, "text.context", context
