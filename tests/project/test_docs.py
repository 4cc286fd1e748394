"""The docs agree with the code: snippets run, links lead somewhere, fields and evidence are in the glossary."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from PIL import Image

from places import DOCS, ROOT
from vitprune_env import policy, types
from vitprune_env.agents import foreign
from vitprune_env.engine import evidence, families
from vitprune_env.models import load

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)  # with what it prints, if shown
SNIPPETS = {
    f"{page.relative_to(ROOT).as_posix()}-{number}": match.groups()
    for page in PAGES
    for number, match in enumerate(BLOCK.finditer(page.read_text("utf-8")), 1)
}
OPTIONAL = ("benchmarl", "onnx", "torchrl", "torchvision", "transformers")  # a snippet that names one needs the package
BROUGHT = {  # folders of images that a reader brings
    "docs/imagenet.md-1": [f"imagenet/val/{digit}" for digit in range(10)],
    "docs/imagenet.md-2": [f"photographs/{split}/{name}" for split in ("train", "val") for name in ("cat", "dog")],
    "docs/photographs.md-1": [
        f"downloads/caltech101/101_ObjectCategories/{name}" for name in ("BACKGROUND_Google", "ant")
    ],
}
REPLACED = {  # what a test has not, and what stands in for it
    "docs/imagenet.md-1": {
        '"deit_small_patch16_224", pretrained=True': '"vit_digits"',
        "/data/": "",
        ", workers=8": "",
    },
}
PATHS = re.compile(r"(?<![\w/])(?:vitprune_env|agents|baselines|examples|tests)/[\w/]+(?:\.\w+)?")
GLOSSARY = (DOCS / "glossary.md").read_text("utf-8")
CONTAINERS = ("Observation", "Decision", "Step", "Outcome", "Episode")
REGISTRIES: tuple[tuple[ModuleType, str], ...] = (
    (foreign, "_BUILDERS"),
    (evidence, "EVIDENCE"),
    (families, "FAMILIES"),
    (policy, "_CLASSES"),
    (load, "_BUILDERS"),
)


@pytest.fixture
def registries() -> Iterator[None]:
    """What a snippet registers is gone after it; what the packages register when they are imported stays."""
    for package in policy.BUILT_IN:
        import_module(package)
    held = [cast(Any, getattr(module, name)) for module, name in REGISTRIES]
    before = [each.copy() for each in held]
    yield
    for each, old in zip(held, before, strict=True):
        each.clear()
        each.update(old) if isinstance(each, dict) else each.extend(old)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_stands_alone(
    snippet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs in an empty namespace and an empty folder, and prints what the page shows beneath it."""
    monkeypatch.chdir(tmp_path)
    code, shown = SNIPPETS[snippet]
    for package in OPTIONAL:
        if package in code:
            pytest.importorskip(package)
    for folder in BROUGHT.get(snippet, ()):
        Path(folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(Path(folder, "image_0001.jpg"))
    for brought, instead in REPLACED.get(snippet, {}).items():
        assert brought in code
        code = code.replace(brought, instead)
    program = compile(code, snippet, "exec", dont_inherit=True)  # without the __future__ import of this file
    exec(program, {"__name__": "snippet"})
    assert shown is None or capsys.readouterr().out == shown


def test_the_pages_have_snippets() -> None:
    assert {"README.md-6", "CONTRIBUTING.md-9", "docs/environment.md-9"} <= SNIPPETS.keys()
    assert not re.search(r"^```py$", "".join(page.read_text("utf-8") for page in PAGES), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names under which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_map_names_every_page() -> None:
    text = (DOCS / "index.md").read_text("utf-8")
    for page in DOCS.rglob("*.md"):
        assert page.name == "index.md" or f"]({page.relative_to(DOCS)})" in text, page


def test_files_that_the_map_and_the_guide_name_exist() -> None:
    for page in (DOCS / "index.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("decisions/*.md")):
        for path in PATHS.findall(page.read_text("utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def section(title: str) -> dict[str, list[str]]:
    """Rows of the table under a heading of the glossary, by their first cell."""
    body = re.split(r"^## ", GLOSSARY, flags=re.MULTILINE)
    lines = next(part for part in body if part.startswith(f"{title}\n")).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_glossary_has_every_field_with_its_shape(name: str) -> None:
    """Shapes are those of the comments in types.py."""
    table, source = section(name), inspect.getsource(types)
    (body,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    assert list(table) == [cast(ast.Name, node.target).id for node in fields]
    for node, (cell, _) in zip(fields, table.values(), strict=True):
        shape = re.search(r"# .*?(\[[^\]]*\])", source.splitlines()[node.lineno - 1])
        assert re.findall(r"\[[^\]]*\]", cell) == ([shape[1]] if shape else []), cast(ast.Name, node.target).id


def test_the_glossary_has_all_evidence_with_its_macs() -> None:
    table, rows, width = section("Evidence"), torch.tensor([5.0, 7.0], dtype=torch.float64), 6
    built_in = {name for name, record in evidence.EVIDENCE.items() if record.packed.__module__ == evidence.__name__}
    built_in |= {name for name, it in evidence.IMAGE_EVIDENCE.items() if it.patches.__module__ == evidence.__name__}
    assert set(table) == built_in  # examples that other tests import register evidence of their own
    for name, (*_, macs) in table.items():
        expected = eval(macs.strip("`"), {"rows": rows, "width": width}) + torch.zeros_like(rows)
        assert torch.equal(evidence.evidence_macs({name}, rows, width), expected), name
