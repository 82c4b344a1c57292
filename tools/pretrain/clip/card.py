"""The section of the model card about clip-mini."""

from typing import Any

from deltalens.data.drawn_shapes import COLOURS, HELD_OUT, SHAPES, TEXTURES

CLIP = """
## clip-mini

An open_clip `CLIP` (`open_clip.model.CLIP`, unmodified) for `pip install deltalens[open-clip]`:

```python
model = dl.create_backbone("deltalens/clip-mini", class_names=["goldfish", "school bus"])
```

| stored parameters | input | context | val top-1 / top-5 | test top-1 / top-5 | drawings of unseen pairs |
|---|---|---|---|---|---|
| {stored:.2f} M | {input_size} px | {context} tokens | {val} | {test} | {drawn:.1f} % |

* Image tower: as `vit-mini`, without a norm before the blocks. Text tower: causal, four blocks of width 128,
  four heads. Both end in {embed_dim} dimensions. Preprocessing as above. The file is float16; the accuracies
  are of the file.
* **Zero-shot** is among the 200 classes of Tiny ImageNet by their first names, with the mean text features of
  the seven templates that Radford et al. name for ImageNet. These classes and names were trained: this is no
  accuracy on new concepts.
* **Vocabulary.** CLIP's byte pairs, 49,408 entries. The file has the {rows} rows of those that occur in
  training. The others are drawn when the model is built (`numpy.random.RandomState(0)`, mean and standard
  deviation of the trained ones), so that unknown words differ from each other, and mean nothing. What the model
  knows are the names of the 200 classes and words for colours, textures and shapes.
* **Data.** The training set of above with all synonyms that ImageNet has for its classes, in {templates}
  templates; {share:.0f} % of the images are drawings of {textures} textures, {colours} colours and {shapes}
  shapes (`deltalens.data.drawn_shapes`, style `FLAT`) with captions of one to three of these words. A quarter
  of the pairs of colour and shape was held out; the last column is the accuracy on 1,000 drawings of these,
  among all {unseen} names of such pairs.
* **Loss.** CLIP's, with several positives: the texts of a step are a caption of every class and one of each
  drawing, the target of an image is spread over the captions that describe it, that of a caption over the
  images it describes.
* **Recipe.** The image tower begins as vit-mini. First {text_minutes:g} minutes ({text_steps:,} steps of
  {text_batch}) of the text tower and the projections on kept features of the frozen image tower, as in LiT;
  then both, {epochs:.1f} epochs: {opt}, batch {batch}, peak learning rates {lr:g} and {joint_lr:g}, weight
  decay {decay:g}, cosine with warm-up, EMA {ema:g}; random resized crop from {area:g}, flip, colour jitter
  {jitter:g}. {hours:.1f} h in all on one CPU core that had other work{unfinished}.
"""


def section(facts: dict[str, Any]) -> str:
    """facts: those of `clip-mini.json`."""
    recipe = facts["recipe"]
    val, test = (f"{facts[split]['top1']:.1f} / {facts[split]['top5']:.1f} %" for split in ("val", "test"))
    return CLIP.format(
        stored=facts["stored_parameters"] / 1e6,
        input_size=facts["input_size"],
        context=facts["config"]["text_cfg"]["context_length"],
        embed_dim=facts["config"]["embed_dim"],
        val=val,
        test=test,
        drawn=facts["held_out_drawings"]["top1"],
        rows=facts["stored_token_rows"],
        templates=len(facts["training_templates"]),
        share=100 * recipe["drawn_share"],
        textures=len(TEXTURES),
        colours=len(COLOURS),
        shapes=len(SHAPES),
        unseen=len(HELD_OUT) * len(TEXTURES),
        text_minutes=recipe["text_minutes"],
        text_steps=facts["text_steps"],
        text_batch=recipe["text_batch_size"],
        epochs=facts["epochs"],
        opt=recipe["opt"],
        batch=recipe["batch_size"],
        lr=recipe["lr"],
        joint_lr=recipe["joint_lr"],
        decay=recipe["weight_decay"],
        ema=recipe["ema_decay"],
        area=recipe["min_area"],
        jitter=recipe["color_jitter"],
        hours=facts["hours"],
        unfinished="" if facts["schedule_done"] == 1 else " (unfinished run)",
    )
