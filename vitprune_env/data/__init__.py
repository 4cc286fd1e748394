"""Images and labels: the built-in task (`Digits`), image files (`open_images`), and batches of any dataset."""

from vitprune_env.data.batches import ImageDataset, batches_of, fetch
from vitprune_env.data.classes import labels_of, names_of
from vitprune_env.data.digits import Digits, DigitsConfig
from vitprune_env.data.image_files import ImageBatches, ImageFiles, data_config, open_images, open_source

__all__ = [
    "Digits",
    "DigitsConfig",
    "ImageBatches",
    "ImageDataset",
    "ImageFiles",
    "batches_of",
    "data_config",
    "fetch",
    "labels_of",
    "names_of",
    "open_images",
    "open_source",
]
