"""The documentation site is built without warnings, and holds what comes from outside its folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def text(page: str) -> str:
        return (tmp_path / page / "index.html").read_text("utf-8")

    assert 'href="../contributing/' in text("training")  # ../CONTRIBUTING.md of the repository
    assert 'href="../source/examples/custom_reward.py/"' in text("training")
    assert 'src="../photographs.png"' in text("readme_page")
    assert 'id="vitprune_env.game.token_game.TokenGame.step"' in text("api/game")
    assert "tokens_figure" in text("notebook")
    outside = ('src="http', 'rel="stylesheet" href="http')  # scripts, pictures or styles from elsewhere
    assert not any(each in text(page) for page in ("readme_page", "game", "api/game") for each in outside)
