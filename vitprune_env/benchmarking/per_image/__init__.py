"""What a policy does image by image: difficulty, diversity, layers, patch lives."""

from vitprune_env.benchmarking.per_image.difficulty import Correlation, rank_correlation
from vitprune_env.benchmarking.per_image.diversity import DiversityPoint, diversity_points
from vitprune_env.benchmarking.per_image.records import ImageRecords, lives_of, record
from vitprune_env.benchmarking.per_image.views import Measure, Views

__all__ = [
    "Correlation",
    "DiversityPoint",
    "ImageRecords",
    "Measure",
    "Views",
    "diversity_points",
    "lives_of",
    "rank_correlation",
    "record",
]
