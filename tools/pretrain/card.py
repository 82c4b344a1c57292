"""The model card that lies beside the packaged weights."""

import json
from pathlib import Path
from typing import Any

from .clip.card import section as clip_section
from .points.card import section as points_section

CARD = """\
# Weights shipped with deltalens

Four small backbones for tests, demonstrations, teaching and research without a download. Two are for images alone:
`import deltalens.backbones.shipped` registers them with timm; they are timm's own `SwinTransformer` and
`VisionTransformer`. The third reads images and texts: [below](#clip-mini); the fourth point clouds:
[below](#points-mini).

```python
model = timm.create_model("deltalens_swin_mini", pretrained=True, num_classes=10)
```

| model | parameters | input | val top-1 / top-5 | test top-1 / top-5 | epochs |
|---|---|---|---|---|---|
{rows}

* `swin-mini`: embed dim 40, depths 2-2-6-2, heads of 20 channels, windows of 4, strides 4, 8, 16, 32.
* `vit-mini`: embed dim 192, six blocks, six heads of 32 channels, patches of 8, class token.
* Preprocessing: ImageNet mean and standard deviation, bicubic resizing, whole image (crop 1.0). Another `img_size`
  interpolates position embeddings and bias tables, as for any timm model.
* Files: float16 safetensors, loaded as float32. The accuracies were measured with these files, not with the training
  state. `<name>.json` holds the recipe, the accuracies and the names of the 200 classes in the order of the logits.

## Data

Tiny ImageNet (200 classes of ImageNet), reduced to 48 x 48 px: 80,000 pictures of its training set, and its official
validation set in two halves of 5,000, called val (watched during training) and test. Swin sees them enlarged to 64 px.
The accuracies are those of small networks after a short training on thumbnails: compare methods with them, do not
deploy them.

## Recipe

{recipes}

Made by `python -m tools.pretrain` of the source repository, which can train them again, longer, or on a GPU.
{clip}{points}
## Terms

Tiny ImageNet derives from ImageNet, whose terms allow non-commercial research and education only; the images
belong to their owners, and none is contained here. Whether such terms reach weights trained on the images is not
settled. The weights are offered for tests, demonstrations and research; deltalens's own licence covers the code and
grants no right on ImageNet.
"""


def write_card(weights: Path) -> None:
    """The card of all models whose facts lie in the folder of the weights."""
    found = [json.loads(path.read_text()) for path in sorted(weights.glob("*.json"))]
    write(weights / "README.md", render(found))


def write(path: Path, text: str) -> None:
    partial = path.with_name("partial-" + path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


def render(models: list[dict[str, Any]]) -> str:
    of_timm = [facts for facts in models if "timm_name" in facts]
    return CARD.format(
        rows="\n".join(_row(facts) for facts in of_timm),
        recipes="\n".join(_recipe(facts) for facts in of_timm),
        clip="".join(clip_section(facts) for facts in models if facts.get("library") == "open_clip"),
        points="".join(points_section(facts) for facts in models if facts.get("kind") == "points"),
    )


def _row(facts: dict[str, Any]) -> str:
    accuracies = (f"{facts[split]['top1']:.1f} / {facts[split]['top5']:.1f} %" for split in ("val", "test"))
    unfinished = "" if facts["schedule_done"] == 1 else " (unfinished run)"
    cells = [
        f"`{facts['timm_name']}`",
        f"{facts['parameters'] / 1e6:.2f} M",
        f"{facts['input_size']} px",
        *accuracies,
        f"{facts['epochs']:.1f}{unfinished}",
    ]
    return f"| {' | '.join(cells)} |"


def _recipe(facts: dict[str, Any]) -> str:
    recipe = facts["recipe"]
    sizes = ", ".join(str(size) for size in facts["image_sizes"])
    teacher = f"; distilled from `{recipe['teacher']}`" if recipe["teacher"] else ""
    return (
        f"* `{facts['name']}`: {recipe['opt']}, batch {recipe['batch_size']}, peak learning rate {recipe['lr']:g}, "
        f"weight decay {recipe['weight_decay']:g}, cosine with warm-up over {facts['epochs']:.1f} epochs "
        f"({facts['hours']:.1f} h), EMA {recipe['ema_decay']:g}; image sizes {sizes} px; random resized crop from "
        f"{recipe['min_area']:g}, flip, colour jitter {recipe['color_jitter']:g}, mixup {recipe['mixup']:g}, cutmix "
        f"{recipe['cutmix']:g}, label smoothing {recipe['smoothing']:g}{teacher}."
    )
