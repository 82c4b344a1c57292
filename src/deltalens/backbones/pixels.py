"""Where the pixels enter a network: the slots `image` and `stem.parallel`, for every family.

* `image`, of the module that receives the pixels: f(image (B, C, H, W)) -> image, before anything else.
* `stem.parallel`, of the first convolution: f(image) -> what is added to the convolution's output.
"""

from __future__ import annotations

from torch import Tensor, nn

from deltalens.sites.anatomy import Family
from deltalens.sites.output import live
from deltalens.sites.swap import inner_method


def through_images(module: nn.Module, x: Tensor) -> Tensor:
    """The image as the active `image` modules of `module` make it."""
    for change in live(module, "image"):
        x = change(x)
    return x


def read_pixels(self: nn.Module, x: Tensor, *args, **kwargs):
    """A module's own forward, and the weight modules in it, with what is in its two slots."""
    x = through_images(self, x)
    y = inner_method(self, "forward")(x, *args, **kwargs)
    for change in live(self, "stem.parallel"):
        y = y + change(x)
    return y


IMAGE = Family(name="deltalens.backbones.pixels:IMAGE", methods={"forward": read_pixels}, slots=frozenset({"image"}))
STEM = Family(
    name="deltalens.backbones.pixels:STEM", methods={"forward": read_pixels}, slots=frozenset({"stem.parallel"})
)
