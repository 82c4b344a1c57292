"""The section of the model card about points-mini."""

from typing import Any

POINTS = """
## points-mini

A `deltalens.models.point_transformer.PointTransformer` for point clouds, pretrained without labels:

```python
model = dl.create_backbone("deltalens/points-mini", num_classes=10)  # a fresh head
logits = model(clouds)  # (B, {num_points:,}, 3), in the unit ball
```

| parameters | clouds | linear SVM, val / test | untrained | largest class | epochs |
|---|---|---|---|---|---|
| {row} |

* {num_groups} patches of {group_size} points, embed dim {dim}, {depth} blocks, {heads} heads, a class token, a linear
  head on class token and maximum over the patches. The file is float16, loaded as float32, and holds no head.
* **Data.** ModelNet10 on grids of 30 x 30 x 30 voxels, {train:,} training shapes; each epoch draws a new cloud from the
  surface voxels of each. Val ({val_n}) and test ({test_n}) shapes were not trained on.
* **Proof.** The accuracies are those of a linear SVM (C = 0.01, nothing searched) on frozen, standardised features of
  one cloud per shape, fitted on the training shapes with labels; beside it the same on an untrained network, and the
  share of the largest class, which is chance. The shapes all stand upright and face the same way. Shapes this coarse
  are not the published ModelNet10: do not compare the numbers with papers.
* **Loss.** Point-MAE's: {mask:.0f} % of the patches are hidden and rebuilt, Chamfer distance L2, with a decoder of
  {decoder} blocks. Unlike there the class token is pretrained, too.
* **Recipe.** {opt}, batch {batch}, peak learning rate {lr:g}, weight decay {decay:g}, cosine with warm-up over
  {epochs:.1f} epochs, EMA {ema:g}; random turn about the upright axis, stretching of each axis by up to {scale:g},
  shift by up to {shift:g}. {minutes:.0f} minutes on a third of one CPU core.
* **Terms.** Princeton ModelNet is for academic use; none of its shapes is contained here. As above, the weights are
  offered for tests, demonstrations and research.
"""


def section(facts: dict[str, Any]) -> str:
    """facts: those of `points-mini.json`."""
    recipe, config, shapes = facts["recipe"], facts["config"], facts["shapes"]
    trained, untrained, chance = facts["linear_svm"], facts["linear_svm_untrained"], facts["largest_class"]
    return POINTS.format(
        row=" | ".join(
            [
                f"{facts['parameters'] / 1e6:.2f} M",
                f"{facts['num_points']:,} points",
                *(f"{each['val']:.1f} / {each['test']:.1f} %" for each in (trained, untrained, chance)),
                f"{facts['epochs']:.1f}" + ("" if facts["schedule_done"] == 1 else " (unfinished run)"),
            ]
        ),
        num_points=facts["num_points"],
        epochs=facts["epochs"],
        num_groups=config["num_groups"],
        group_size=config["group_size"],
        dim=config["dim"],
        depth=config["depth"],
        heads=config["heads"],
        train=shapes["train"],
        val_n=shapes["val"],
        test_n=shapes["test"],
        mask=100 * recipe["mask_ratio"],
        decoder=recipe["decoder_depth"],
        opt=recipe["opt"],
        batch=recipe["batch_size"],
        lr=recipe["lr"],
        decay=recipe["weight_decay"],
        ema=recipe["ema_decay"],
        scale=recipe["scale"],
        shift=recipe["shift"],
        minutes=60 * facts["hours"],
    )
