"""Images and labels: the built-in task (`Digits`), image files (`open_images`) and views of them, batches of both."""

from vitprune_env.data.batches import ImageDataset, batches_of, fetch
from vitprune_env.data.classes import labels_of, names_of
from vitprune_env.data.digits import Digits, DigitsConfig
from vitprune_env.data.image_files import ImageBatches, ImageFiles, data_config, open_images, open_source
from vitprune_env.data.views import RandomViews

__all__ = [
    "Digits",
    "DigitsConfig",
    "ImageBatches",
    "ImageDataset",
    "ImageFiles",
    "RandomViews",
    "batches_of",
    "data_config",
    "fetch",
    "labels_of",
    "names_of",
    "open_images",
    "open_source",
]
