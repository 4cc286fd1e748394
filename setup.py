"""The description on a package index; all else is in setup.cfg.

README.md has relative links, such as `docs/pareto.png`, which a page of a package index cannot follow. Once setup.cfg
names the repository,

    project_urls =
        Source = https://...

the links of the description lead there (to `raw/HEAD/` for pictures, to `blob/HEAD/` for all else). Until then the
description has no pictures, and its relative links are plain text.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
RELATIVE = r"\((?![a-z]+:|#)([^)\s]+)\)"  # the target of a link, unless it is an address or a heading


def repository(settings: str) -> str | None:
    """The address in `project_urls = Source = ...` of a setup.cfg."""
    parser = ConfigParser(interpolation=None)
    parser.read_string(settings)
    urls = parser.get("metadata", "project_urls", fallback="")
    found = re.search(r"^\s*Source\s*=\s*(\S+?)/?\s*$", urls, flags=re.MULTILINE)
    return found and found[1]


def index_page(readme: str, address: str | None) -> str:
    """The README with links that work outside the repository."""
    if address is None:
        readme = re.sub(rf"^!\[[^\]]*\]{RELATIVE}\n+(\*[^*]+\*\n+)?", "", readme, flags=re.MULTILINE)
        return re.sub(rf"\[([^\]]*)\]{RELATIVE}", r"\1", readme)
    readme = re.sub(rf"(!\[[^\]]*\]){RELATIVE}", rf"\1({address}/raw/HEAD/\2)", readme)
    return re.sub(rf"(?<!!)(\[[^\]]*\]){RELATIVE}", rf"\1({address}/blob/HEAD/\2)", readme)


if __name__ == "__main__":
    text = index_page(
        (HERE / "README.md").read_text(encoding="utf-8"), repository((HERE / "setup.cfg").read_text(encoding="utf-8"))
    )
    setup(long_description=text, long_description_content_type="text/markdown")
