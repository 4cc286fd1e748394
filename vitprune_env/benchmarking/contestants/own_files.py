"""Policies of the user's own, named as FILE.py:NAME or module:NAME."""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from vitprune_env.baselines import available
from vitprune_env.errors import SettingsError


def is_own(text: str) -> bool:
    """Whether a text names a policy of the user's own, rather than a baseline, whose parameters follow a colon, too."""
    return ":" in text and text.partition(":")[0] not in available()


def label_of(text: str) -> str:
    """The name in figures and on pages of what `--policy` names."""
    return text.rpartition(":")[2] if is_own(text) else text


def load_object(text: str, flag: str = "policies") -> Any:
    """What `FILE.py:NAME` or `module:NAME` names, such as a policy's class.

    Args:
        text: the name.
        flag: what errors call it.

    Raises:
        SettingsError: for text of another form, a file or module that cannot be imported, or a name that is not in it.
    """
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise SettingsError(f"{flag}: expected FILE.py:NAME or module:NAME, got {text!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as with `python -m`
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else import_module(place)
    except (ImportError, OSError, SyntaxError) as error:
        raise SettingsError(f"{flag}: expected a file or module to import, got {place!r} ({error})") from error
    if not hasattr(module, name):
        raise SettingsError(f"{flag}: expected a name in {place}, got {name!r}")
    return getattr(module, name)


def _module_of(file: Path) -> ModuleType:
    """Run a file as a module of its name."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    name = f"own_policies_{file.stem}"  # not the name of an installed module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and inspect look it up there
    spec.loader.exec_module(module)
    return module
