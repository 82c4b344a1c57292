"""Families of torchvision: module in which a block's class is defined -> the files that know it."""

FAMILIES: dict[str, tuple[str, ...]] = {}
