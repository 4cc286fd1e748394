"""The output folder of a command: what it is called, what was asked for there, and that nothing in it is lost.

A command that starts writes its flags into the folder. `--resume` takes them from there, and a folder that holds a run
is refused unless the command continues it (`--resume`) or is told to replace it (`--overwrite`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FLAGS_FILE = "flags.json"
NOT_STORED = ("--output", "--resume", "--no-resume", "--overwrite", "--no-overwrite")


def stored_words(folder: Path) -> list[str]:
    """The flags of the run in a folder, as words of a command line; none where there is no run, or an older one.

    Raises:
        CheckpointError: for a file that does not hold them.
    """
    from vitprune_env.errors import CheckpointError

    path = folder / FLAGS_FILE
    if not path.is_file():
        return []
    try:
        return [str(word) for word in json.loads(path.read_text())["flags"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: expected the flags of a run, got something else ({error!r})") from error


def store_words(folder: Path, words: Sequence[str]) -> None:
    """Write the flags of a run, but for those that say where it is and how it starts.

    Raises:
        StorageError: if they cannot be written.
    """
    from vitprune_env.files import replace_file

    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in NOT_STORED and not skip:
            kept.append(word)
        skip = name == "--output" and not equals  # its value is the next word
    replace_file(folder / FLAGS_FILE, (json.dumps({"flags": kept}, indent=2) + "\n").encode())


def make_way(folder: Path, results: Sequence[str], overwrite: bool, quick: bool) -> None:
    """Refuse a folder that holds a run, or remove what says so.

    Args:
        folder: of a command that is not to continue what is there.
        results: files that a run leaves there; the first of them says that it is finished.
        overwrite: whether the run may be replaced.
        quick: whether the new run is a small one, which may replace another small one.

    Raises:
        SettingsError: for a folder with a run that may not be replaced.
    """
    from vitprune_env.errors import SettingsError

    found = [name for name in results if (folder / name).exists()]
    if found and not overwrite and not (quick and "--quick" in stored_words(folder)):
        what = "a finished run" if found[0] == results[0] else "an interrupted run"
        shows = " (see table.md there)" if (folder / "table.md").exists() else f" ({found[0]})"
        raise SettingsError(
            f"output: expected a folder without a run, got {folder}, which holds {what}{shows}; --resume goes on with "
            "it, --overwrite replaces it, --output DIR leaves it where it is"
        )
    for name in found:
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)  # processes of one run clear its folder at the same time
