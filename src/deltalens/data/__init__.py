"""Datasets, one file per format; every one becomes a `Splits`."""

from deltalens.data.arrays import ArrayDataset
from deltalens.data.clouds import CloudArrays, CloudFiles
from deltalens.data.dense_items import DenseImages, MaskedImages, ObjectImages, Objects
from deltalens.data.dense_transforms import DenseAugmentation
from deltalens.data.formats import read_data, read_part
from deltalens.data.image_folder import ImageFiles, read_image_folder, read_split
from deltalens.data.image_items import ImageItems
from deltalens.data.inputs import Augmentation, set_inputs
from deltalens.data.options import ReadOptions
from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.splits import Splits, stratified_split
from deltalens.data.subsets import TrainingSubset
from deltalens.data.transforms import eval_transform, train_transform

__all__ = [
    "ArrayDataset",
    "Augmentation",
    "CloudArrays",
    "CloudFiles",
    "DenseAugmentation",
    "DenseImages",
    "ImageFiles",
    "ImageItems",
    "MaskedImages",
    "ObjectImages",
    "Objects",
    "OrientedImages",
    "OrientedObjects",
    "ReadOptions",
    "Splits",
    "TrainingSubset",
    "eval_transform",
    "read_data",
    "read_image_folder",
    "read_part",
    "read_split",
    "set_inputs",
    "stratified_split",
    "train_transform",
]
