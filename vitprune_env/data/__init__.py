"""Images and labels: the built-in tasks (`Digits`), image files (`open_images`) and views of them, batches of both."""

from vitprune_env.data.batches import BatchList, ImageDataset, batches_of, fetch, groups_of
from vitprune_env.data.classes import labels_of, names_of
from vitprune_env.data.digits import TASKS, TWINS, Digits, DigitsConfig
from vitprune_env.data.image_files import ImageBatches, ImageFiles, data_config, open_images, open_source
from vitprune_env.data.views import RandomViews

__all__ = [
    "TASKS",
    "TWINS",
    "BatchList",
    "Digits",
    "DigitsConfig",
    "ImageBatches",
    "ImageDataset",
    "ImageFiles",
    "RandomViews",
    "batches_of",
    "data_config",
    "fetch",
    "groups_of",
    "labels_of",
    "names_of",
    "open_images",
    "open_source",
]
