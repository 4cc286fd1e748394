"""What the site has beside the pages in this folder; see `mkdocs.yml`.

README and CONTRIBUTING become pages, files that pages link to become pages with their source, every room gets a page of
its API, the notebook is shown as a page, and pages that the navigation does not name are listed at its end.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
OUTSIDE = {"README.md": "readme_page.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOK = "quickstart.ipynb"
ROOMS = (
    *("engine", "game", "envs", "integrations", "deploy", "models", "data", "plots"),
    *("agents", "baselines", "benchmarking", "playground"),
)
WORDS = ("types", "policy", "errors")  # modules that all rooms share
FURTHER = "Further"  # title of the pages that the navigation does not name
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)

_origins: dict[str, Path] = {}  # of the pages made here from files elsewhere: the files, by the names of the pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List pages that the navigation does not name."""
    nav = [entry for entry in config.nav or [] if FURTHER not in entry]  # which an earlier build may have added
    named = set(re.findall(r"[\w/]+\.md", json.dumps(nav)))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    if rest := sorted(there - named):
        nav.append({FURTHER: rest})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from elsewhere."""

    def add(uri: str, text: str) -> None:
        files.append(File.generated(config, uri, content=text))

    for name, uri in OUTSIDE.items():
        _origins[uri] = ROOT / name
        add(uri, (ROOT / name).read_text("utf-8"))
    pages = [*DOCS.rglob("*.md"), *(ROOT / name for name in OUTSIDE)]
    for path in sorted({path for page in pages for path in _sources(page)}):
        name = path.relative_to(ROOT).as_posix()
        add(
            f"source/{name}.md",
            f"# `{name}`\n\n```{path.suffix[1:].replace('py', 'python')}\n{path.read_text('utf-8')}```\n",
        )
    for room in ROOMS:
        add(f"api/{room}.md", _reference(f"vitprune_env.{room}", _modules(ROOT / "vitprune_env" / room)))
    add("api/words.md", _reference("Words of the game", [f"vitprune_env.{name}" for name in WORDS]))
    add("notebook.md", _notebook(json.loads((DOCS / NOTEBOOK).read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links to files outside the folder lead to the pages made of them."""
    place = _origins.get(page.file.src_uri, DOCS / page.file.src_uri)

    def replaced(found: re.Match[str]) -> str:
        start, target, anchor, end = found.groups(default="")
        path = (place.parent / target).resolve()
        if re.match(r"[a-z]+:", target) or not path.exists():
            return found[0]
        if path.is_dir():
            path = path / "README.md" if path.is_relative_to(DOCS) else ROOT / "README.md"
        uri = posixpath.relpath(_uri(path), posixpath.dirname(page.file.src_uri))
        return f"{start}{uri}{anchor}{end}"

    return _outside_of_code(markdown, lambda text: LINK.sub(replaced, text))


def _uri(path: Path) -> str:
    """The page or file of the site for a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return OUTSIDE.get(name, f"source/{name}.md")


def _sources(page: Path) -> set[Path]:
    """Files with code that a page links to."""
    found: set[Path] = set()
    _outside_of_code(page.read_text("utf-8"), lambda text: found.update(_targets(page, text)) or text)
    return {
        path for path in found if not path.is_relative_to(DOCS) and path.relative_to(ROOT).as_posix() not in OUTSIDE
    }


def _targets(page: Path, text: str) -> set[Path]:
    paths = {(page.parent / target).resolve() for _, target, _, _ in LINK.findall(text)}
    return {path for path in paths if path.is_file()}


def _outside_of_code(markdown: str, change: Any) -> str:
    parts = FENCE.split(markdown)  # every second one is a block of code
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def _modules(folder: Path) -> list[str]:
    """Modules of a room, those in its folders as well."""
    prefix = f"vitprune_env.{folder.name}"
    files = [path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    return [".".join([prefix, *file.parts]) for file in files if not file.name.startswith("_")]


def _reference(title: str, modules: list[str]) -> str:
    """A page of mkdocstrings."""
    return f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def _notebook(notebook: dict[str, Any]) -> str:
    """Cells and what they print as a page."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            printed = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)
