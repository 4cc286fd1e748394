"""Numbers that papers print, with their sources, and how they are shown beside numbers of ours."""

from vitprune_env.benchmarking.published.beside import check_published, save_beside
from vitprune_env.benchmarking.published.rows import PublishedRow, network_of, published_rows, published_table

__all__ = ["PublishedRow", "check_published", "network_of", "published_rows", "published_table", "save_beside"]
