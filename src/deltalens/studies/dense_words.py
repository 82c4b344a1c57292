"""What people call the metrics of dense tasks."""

SAID = {
    "miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy", "map": "box AP (COCO)",
    "map50": "box AP50", "map75": "box AP75", "map50_voc07": "AP50, VOC 2007", "map50_voc": "AP50, VOC 2010",
    "mask_map": "mask AP (COCO)", "mask_map50": "mask AP50", "mask_map75": "mask AP75",
}  # fmt: skip
