"""The layout of the project, its public names, and that importing it changes nothing in the world."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tarfile
import tokenize
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import setup
import vitprune_env
from places import ROOT
from vitprune_env.files import versions

LINKS = ("agents", "baselines", "examples")  # in vitprune_env, to the folders beside it
FOLDERS = ("vitprune_env", "agents", "baselines", "examples", "tests")
SOURCES = sorted(  # reached through their folders, not through the links
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] not in [("vitprune_env", link) for link in LINKS]
)
LIBRARY = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ("examples", "tests")]


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_agents_and_baselines_are_imported_by_their_full_names(path: Path) -> None:
    assert not imported(path) & {"agents", "baselines"}


def test_timm_is_new_enough() -> None:
    """Older ones unpickle class maps and weight files with whatever code is in them."""
    needed = configparser.ConfigParser()
    needed.read(ROOT / "setup.cfg")
    floor = re.search(r"^timm>=([\d.]+)$", needed["options"]["install_requires"], re.M)
    assert floor is not None
    assert tuple(map(int, floor[1].split("."))) >= (1, 0, 28)


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): count for path in SOURCES if (count := len(path.read_text().splitlines())) > 450
    }
    assert not long, "is each of these still one idea?"


def test_no_folder_is_crowded() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in {path.parent for path in LIBRARY} | {ROOT / "examples"}
        if (count := len(list(folder.glob("*.py")))) > 12
    }
    assert not crowded, "give these rooms of their own"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_named_like_what_it_defines(path: Path) -> None:
    """`import package.thing as m` must give the module, not a function of that name that the package re-exports."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert path.stem not in names


def test_no_machine_paths() -> None:
    homes = tuple("/" + name + "/" for name in ("work", "tmp", "root", "home"))
    for path in SOURCES:
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in (tokenize.STRING, tokenize.COMMENT):
                    assert not any(home in token.string for home in homes), (path, token.start)


def test_links_are_relative_and_reach_the_folders() -> None:
    for name in LINKS:
        link = ROOT / "vitprune_env" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert list(link.glob("*.py"))


def test_top_level_folders_are_the_fixed_ones() -> None:
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert found == set(FOLDERS)
    assert (ROOT / "setup.cfg").is_file()


def test_importing_changes_nothing() -> None:
    """No draw from any random stream, no seed, no thread count, no default type, no plotting or data library."""
    out = run_python(
        "import random, sys, numpy, torch\n"
        "def world():\n"
        "    state = numpy.random.get_state()\n"
        "    return (torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2], "
        "torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.are_deterministic_algorithms_enabled())\n"
        "before = world()\n"
        "import vitprune_env, vitprune_env.baselines\n"
        "assert world() == before\n"
        "print(*sorted({'matplotlib', 'sklearn', 'tianshou', 'tensorboard', 'vitprune_env.agents'} & set(sys.modules)))"
    )
    assert out.strip() == ""


def test_public_names() -> None:
    import vitprune_env.baselines

    promised = {"load_backbone", "TokenGame", "play", "Decision", "Observation", "Policy", "check_policy"}
    assert promised <= set(vitprune_env.__all__)
    homes = {name for names in vitprune_env._HOMES.values() for name in names}
    assert homes == {*vitprune_env.__all__, "__version__"}
    assert {"RandomDrop", "TopK", "EViT"} <= set(vitprune_env.baselines.__all__)
    for package in (vitprune_env, vitprune_env.baselines):
        for name in package.__all__:
            assert getattr(package, name) is not None
            assert getattr(package, name).__doc__, f"{name} needs a docstring"


def test_every_module_says_what_it_is() -> None:
    for path in LIBRARY:
        if text := path.read_text(encoding="utf-8").strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} needs a docstring"


def test_links_of_the_package_index_page_lead_somewhere() -> None:
    readme, settings = ((ROOT / name).read_text("utf-8") for name in ("README.md", "setup.cfg"))
    assert setup.repository(settings) is None, "then check that the links of the built description work"
    relative = re.compile(r"\]\((?!https?://|#)")
    assert relative.search(readme)
    plain = setup.index_page(readme, None)
    assert not relative.search(plain)
    assert "![" not in plain
    assert re.findall("```.*?```", plain, flags=re.DOTALL) == re.findall("```.*?```", readme, flags=re.DOTALL)
    named = "[metadata]\nproject_urls =\n    Source = https://forge.example/a/b/\n"
    linked = setup.index_page(readme, setup.repository(named))
    assert not relative.search(linked)
    assert "](https://forge.example/a/b/raw/HEAD/docs/tokens.png)" in linked
    assert "](https://forge.example/a/b/blob/HEAD/docs/baselines.md)" in linked


def test_the_version_is_the_installed_one() -> None:
    assert vitprune_env.__version__ == versions()["vitprune_env"] == version("vitprune-env")


@pytest.mark.slow
def test_wheel_and_sdist_carry_real_files(tmp_path: Path) -> None:
    """Build both without isolation (needs setuptools in this environment) and look inside."""
    pytest.importorskip("setuptools")
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    skip = (
        "--exclude=.git",
        "--exclude=build",
        "--exclude=dist",
        "--exclude=.venv",
        "--exclude=*.egg-info",
        "--exclude=./runs",
    )
    source.mkdir()
    packed = subprocess.run(["tar", "-C", str(ROOT), *skip, "-cf", "-", "."], capture_output=True, check=True)
    subprocess.run(["tar", "-C", str(source), "-xf", "-"], input=packed.stdout, check=True)
    build = "import setuptools.build_meta as b, sys; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"vitprune_env"}
    with tarfile.open(sdist) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    data = "benchmarking/published/published_results.csv"
    for name in ("__init__.py", "py.typed", data, "agents/__init__.py", "baselines/evit.py", "examples/train_mappo.py"):
        assert f"vitprune_env/{name}" in names
        assert members[f"vitprune_env/{name}"].isfile()
    weights = {path.name for path in (ROOT / "vitprune_env/models/weights").glob("*") if path.is_file()}
    assert weights == {Path(name).name for name in names if name.startswith("vitprune_env/models/weights/")}
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    assert (site / "bin" / "vitprune").is_file()
    for code in (
        "import vitprune_env, vitprune_env.agents, vitprune_env.baselines; print(vitprune_env.__file__)",
        "from vitprune_env import benchmark as b; print(b.__globals__['__file__'])",
        "import runpy, sys; sys.argv = ['train', '--help']\n"
        "import vitprune_env.examples.train_mappo as m; print(m.__file__)\n"
        "runpy.run_module('vitprune_env.examples.train_mappo', run_name='__main__')",
        "from vitprune_env.cli import main; import vitprune_env; print(vitprune_env.__file__)\n"
        "main(['evaluate', '--quick', '--images', '20', '--policy', 'evit'])",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=out, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert str(site) in done.stdout.splitlines()[0]
