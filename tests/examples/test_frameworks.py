"""The examples of other frameworks: short, in the docs, checked by tests/interop. One trains with what is installed."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from places import DOCS, EXAMPLES, TESTS

FILES = sorted((EXAMPLES / "frameworks").glob("*.py"))
INTEROP = TESTS / "interop"


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    return module


def lines_of_code(path: Path) -> int:
    """Lines that are no imports, documentation, comments or blank."""
    text = path.read_text("utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and (is_text or isinstance(node, (ast.Import, ast.ImportFrom))):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in skipped for number, line in numbered)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert lines_of_code(path) <= 40


def test_every_example_is_checked_and_in_the_docs() -> None:
    check, page = module_of(INTEROP / "check.py"), (DOCS / "frameworks.md").read_text("utf-8")
    assert {framework.example for framework in check.FRAMEWORKS.values()} == {path.stem for path in FILES}
    assert set(check.FRAMEWORKS) == {path.stem for path in (INTEROP / "requirements").glob("*.txt")}
    for path in FILES:
        assert f"](../examples/frameworks/{path.name})" in page


@pytest.mark.slow  # numba compiles tianshou's advantages
def test_the_example_of_tianshou_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    example = module_of(EXAMPLES / "frameworks" / "tianshou_ppo.py")
    monkeypatch.setattr(example, "IMAGES", 2)
    before, after = example.train(iterations=0, seed=3), example.train(iterations=1, seed=3)
    tokens = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert after(tokens).shape == (5, 2)
        assert not torch.equal(before(tokens), after(tokens))


def test_a_return_is_that_of_the_game_and_uniform_play_is_in_between() -> None:
    """Keeping everything is paid more than uniform actions on the built-in task, and pruning everything less."""
    check = module_of(INTEROP / "check.py")
    check.IMAGES = 32
    means = {}
    for name, bias in (("keep", 20.0), ("uniform", 0.0), ("prune", -20.0)):
        network = check.uniform(48)
        network.bias.data[1] = bias
        means[name] = check.returns(network).mean().item()
    assert means["prune"] < means["uniform"] < means["keep"]
