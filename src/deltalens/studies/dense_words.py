"""What people call dense tasks and their metrics."""

OF_TASKS = {"instance": "instances", "oriented": "oriented boxes"}

SAID = {
    "miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy", "map": "box AP (COCO)",
    "map50": "box AP50", "map75": "box AP75", "map50_voc07": "AP50, VOC 2007", "map50_voc": "AP50, VOC 2010",
    "map_small": "box AP, small", "map_medium": "box AP, medium", "map_large": "box AP, large",
    "mask_map_small": "mask AP, small", "mask_map_medium": "mask AP, medium", "mask_map_large": "mask AP, large",
    "mask_map": "mask AP (COCO)", "mask_map50": "mask AP50", "mask_map75": "mask AP75",
}  # fmt: skip
OF_ORIENTED = {"map": "AP, IoU .5 to .95", "map75": "AP75", "map50_voc07": "AP50, DOTA's (VOC 2007)"}


def metric_words(metric: str, task: str = "") -> str:
    """What people call a metric of this task."""
    return (OF_ORIENTED if task == "oriented" else {}).get(metric) or SAID.get(metric) or metric.replace("_", " ")


def task_words(task: str) -> str:
    """What people call a dense task."""
    return OF_TASKS.get(task, task)
