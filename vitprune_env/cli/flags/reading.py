"""From the words of a command line to a dataclass of flags, and from the library's messages to those of the command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import tyro

from vitprune_env.cli.flags.common import OutputFlags, ResumableFlags
from vitprune_env.cli.flags.help_texts import join_lines
from vitprune_env.cli.flags.ranges import check_ranges
from vitprune_env.cli.flags.run_folder import stored_words

T = TypeVar("T")
ARGUMENTS = {  # of the library, and their flags
    "checkpoint": "weights",
    "root": "data_dir",
    "data": "data_dir",
    "keep": "target_keep",
    "share": "target_share",
    "gmacs": "target_gmacs",
}


def read_flags(
    flags: type[T],
    argv: Sequence[str] | None,
    description: str | None,
    prog: str | None = None,
    default: T | Callable[[Sequence[str]], T] | None = None,
) -> T:
    """Read a command line into a dataclass of flags; groups of flags are nested dataclasses, flags have short names.

    Without `--output` the folder is called what `run_name` of the flags says if they have one, and a small run's has
    `-quick` behind its name. With `--resume` the flags that are not given are those of the run in the folder.

    Args:
        flags: the dataclass.
        argv: command line; None: that of the process.
        description: shown above the flags by `--help`.
        prog: name of the command; None: that of the process.
        default: values of flags that are not given, or a function that gives them by the words of the command line;
            None: those of the dataclass.

    Raises:
        SettingsError: for a number out of its range, an empty list, or an empty path.
        SystemExit: with code 2, after one line on stderr, for what cannot be read as flags.
    """

    def read(words: Sequence[str]) -> T:
        values = cast(T | None, default(words) if callable(default) else default)
        args = _parsed(flags, words, description, prog, flags() if values is None else values)
        return args if any(word.split("=")[0] == "--output" for word in words) else _named(args)

    words = list(sys.argv[1:] if argv is None else argv)
    args = read(words)
    common = _common(args)
    if not isinstance(common, ResumableFlags):
        return args
    if common.resume and (stored := stored_words(common.output)):
        words = [*stored, *words]  # of a flag that is given twice, the latter counts
        args = read([*words, "--output", str(common.output)])
    return _changed(args, words=tuple(words))


def _common(args: Any) -> OutputFlags | None:
    """The flags that commands have in common, which may be all flags of a script; None: there are none."""
    return args if isinstance(args, OutputFlags) else getattr(args, "common", None)


def _changed(args: T, **values: Any) -> T:
    """The same flags with other values of common flags."""
    if isinstance(args, OutputFlags):
        return cast(T, replace(args, **values))
    return replace(cast(Any, args), common=replace(cast(Any, args).common, **values))


def _parsed(flags: type[T], words: Sequence[str], description: str | None, prog: str | None, default: T) -> T:
    """The flags of a command line.

    Raises:
        SettingsError: for a number out of its range, an empty list, or an empty path.
        SystemExit: with code 2, after one line on stderr, for what cannot be read as flags.
    """
    _check_paths(words, flags)
    join_lines(flags)
    short_names = (tyro.conf.OmitArgPrefixes,)
    said = StringIO()
    try:
        with redirect_stderr(said):
            found = tyro.cli(flags, args=words, description=description, prog=prog, config=short_names, default=default)
    except SystemExit as stopped:
        if stopped.code:
            print(f"error: {_in_one_line(said.getvalue())}", file=sys.stderr)
        raise
    sys.stderr.write(said.getvalue())
    check_ranges(found, default)
    return found


def _named(args: T) -> T:
    """The same flags with an output folder that is called after what runs."""
    common = _common(args)
    if common is None:
        return args
    name = re.sub(r"[^\w.-]+", "_", getattr(args, "run_name", common.output.name))
    return _changed(args, output=common.output.with_name(name + "-quick" * common.quick))


def names_of(flags: type, kind: Any = None) -> list[str]:
    """Names of the flags of a dataclass, of those inside it as well; of one kind, or of all."""
    found, own = [], {each.name for each in fields(flags)}
    for name, hint in get_type_hints(flags).items():
        if name not in own:
            continue
        if is_dataclass(hint):
            found += names_of(cast(type, hint), kind)
        elif kind in (None, hint) or kind in get_args(hint):
            found.append(name)
    return found


def _check_paths(words: Sequence[str], flags: type) -> None:
    """Refuse paths without a letter, such as a variable that is not set: they would mean the folder one is in.

    Raises:
        SettingsError: naming the flag.
    """
    from vitprune_env.errors import SettingsError

    empty = [word[:-1] for word in words if word.endswith("=")]
    empty += [word for word, after in zip(words, words[1:], strict=False) if not after.strip()]
    asked = {word.removeprefix("--").replace("-", "_") for word in empty}
    for name in names_of(flags, Path):
        if name in asked:
            raise SettingsError(f"{name}: expected a path, got none")


def _in_one_line(page: str) -> str:
    """What tyro's page about a mistake says, without its frame, its headings and its help."""
    lines = [line.strip("│|╰╯ ") for line in page.splitlines()[1:]]
    parts = re.split(r"^[─-]+$", "\n".join(lines), flags=re.MULTILINE)
    message, *others = [part for part in parts if part.strip()]
    near = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(others))
    return " ".join(message.split()) + (f"; did you mean {near[1]}?" if near else "")


def in_flags(message: str, flags: type) -> str:
    """What the library says of its arguments, with the flags of a command in their place.

    `num_classes: expected` becomes `--num-classes: expected`, `num_classes=101` becomes `--num-classes 101`, and
    `pretrained=False` becomes `--no-pretrained`.

    Args:
        message: of an error or a warning.
        flags: the dataclass of the command's flags.
    """
    own = names_of(flags)
    names = {name: name for name in own} | {name: flag for name, flag in ARGUMENTS.items() if flag in own}
    known = "|".join(sorted(names, key=len, reverse=True))
    long = "|".join(name for name in names if "_" in name) or "(?!)"  # no words of a sentence

    def flag(found: re.Match[str]) -> str:
        name, value = names[found[1]].replace("_", "-"), (found.groupdict().get("value") or "")
        return {"True": f"--{name}", "False": f"--no-{name}", "": f"--{name}"}.get(value, f"--{name} {value}")

    message = re.sub(rf"^({known})(?=: )", flag, message)
    message = re.sub(rf"(?<![\w./(-])({known})=(?P<value><[^>]*>|[^\s,;()]+)", flag, message)
    return re.sub(rf"(?<![\w./'\"-])({long})(?![\w/'\"=(]|\.\w)", flag, message)
