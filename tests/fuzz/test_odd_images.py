"""Image folders of all kinds: what Pillow reads comes as Pillow reads it, all else is named and left out."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fuzzing import TIMES, attempt, inputs, odd
from tiny import tiny_backbone
from vitprune_env.data import ImageFiles, fetch, open_images
from vitprune_env.errors import UnreadableImageError

BACKBONE = tiny_backbone()
MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16")
FORMATS = ("png", "jpeg", "webp", "bmp", "tiff", "gif")


def written(mode: str, kind: str, size: tuple[int, int], value: int) -> bytes | None:
    """An image of one colour as a file; None where the format does not have the mode."""
    colour: Any = value * 257 if mode == "I;16" else value if mode in ("L", "P", "1") else (value,) * len(mode)
    file = io.BytesIO()
    try:
        Image.new(mode, size, colour).save(file, kind)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def fresh(root: Path) -> Path:
    """The folder, empty but for its class folders."""
    for name in ("a", "b", "c"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for file in (root / name).iterdir():
            file.unlink()
    return root


@TIMES
def test_files_are_read_as_pillow_reads_them_or_named(times: int, tmp_path: Path) -> None:
    side = st.integers(1, 12)
    kinds = st.sampled_from(MODES), st.sampled_from(FORMATS)
    damages = st.sampled_from(["none", "none", "cut", "changed", "noise", "empty", "text"])

    @inputs(60 * times)
    @given(*kinds, side, side, st.integers(0, 255), damages, st.binary(max_size=8))
    def check(mode: str, kind: str, width: int, height: int, value: int, damage: str, other: bytes) -> None:
        root, content = fresh(tmp_path), written(mode, kind, (width, height), value)
        if content is None:
            return
        middle = len(content) // 2
        content = {
            "none": content,
            "cut": content[:middle],
            "changed": content[:middle] + other + content[middle + len(other) :],
            "noise": other,
            "empty": b"",
            "text": b"not an image",
        }[damage]
        place = root / "a" / f"x.{kind}"
        place.write_bytes(content)
        for name in ("a", "b", "c"):
            (root / name / "good.png").write_bytes(written("RGB", "png", (9, 9), 7) or b"")
        files = open_images(BACKBONE, root, on_corrupt="fail", class_map=None)
        index = [files.name(row).endswith(f"x.{kind}") for row in range(len(files))].index(True)
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                readable = True
        except Exception:
            readable = False
        found = attempt(lambda: files[index])
        assert (found is not None) == readable, (mode, kind, damage)
        if found is not None:
            assert found[0].shape == (3, 8, 8)
            assert found[0].isfinite().all()
            assert found[1] == 0
            if damage == "none" and mode in ("RGB", "L", "I;16") and kind in ("png", "bmp", "tiff"):
                expected = torch.full((3, 8, 8), value / 255)
                torch.testing.assert_close(files.to_rgb(found[0][None])[0], expected, atol=0.01, rtol=0)

    check()


@TIMES
def test_folders_and_rows(times: int, tmp_path: Path) -> None:
    pixel = written("RGB", "png", (8, 8), 9) or b""

    @inputs(40 * times)
    @given(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from(["1.png", "2.PNG", "t.txt", "link", "pipe"])), max_size=5
        ),
        odd,
    )
    def check(entries: list[tuple[str, str]], index: Any) -> None:
        root = fresh(tmp_path)
        for folder, name in set(entries):
            if name == "pipe":
                os.mkfifo(root / folder / "pipe.png")
            elif name == "link":
                (root / folder / "circle").symlink_to(root, target_is_directory=True)
            else:
                (root / folder / name).write_bytes(pixel)
        expected = {f"{folder}/{name}" for folder, name in entries if name in ("1.png", "2.PNG")}
        classes = {name.split("/")[0] for name in expected}
        files = attempt(lambda: open_images(BACKBONE, root))
        assert (files is not None) == (len(classes) == 3)
        if files is None:
            return
        assert {str(Path(files.name(row)).relative_to(root)) for row in range(len(files))} == expected
        batch = attempt(lambda: fetch(files, [index]))
        assert (batch is not None) == (
            isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(files)
        )

    check()


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (fresh(tmp_path) if name == "a" else tmp_path).joinpath(name, "x.png").write_bytes(b"no")
    files = open_images(BACKBONE, tmp_path, on_corrupt="fail")
    assert isinstance(files, ImageFiles)
    with pytest.raises(UnreadableImageError, match=r"a/x\.png: not a readable image"):
        _ = files[0]
