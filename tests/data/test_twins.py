"""The task `twins`: two copies of the digit in every scene."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from vitprune_env import load_backbone
from vitprune_env.data import TASKS, TWINS, Digits, DigitsConfig

EVERY = torch.arange(200)


@pytest.fixture(scope="module")
def scenes() -> Digits:
    return Digits("train", 200, config=TWINS)


def test_digits_are_the_scenes_that_they_always_were() -> None:
    """Sums of what the version before `twins` drew; the pictures themselves up to the rounding of other processors."""
    assert TASKS["digits"] == DigitsConfig()
    found = Digits("test", 200, seed=2_000_003)
    drawn = hashlib.sha256()
    for part in (found.source_ids(EVERY), found.sides(EVERY), found._scenes.centre[:, 0], found._scenes.noise_start):
        drawn.update(part.contiguous().numpy().tobytes())
    assert drawn.hexdigest()[:16] == "380bec578c65d172"
    images, _ = found.batch(EVERY)
    assert float(images.double().sum()) == pytest.approx(-80563.0, abs=0.5)
    assert float(images.double().square().sum()) == pytest.approx(565344.54, rel=1e-6)


def test_copies_are_of_different_sizes_and_do_not_overlap(scenes: Digits) -> None:
    small, large = scenes.sides(EVERY, 0), scenes.sides(EVERY, 1)
    assert (small >= 13).all()
    assert (small <= 15).all()
    assert (large >= 15).all()
    assert (large <= 17).all()
    one, other = scenes.boxes(EVERY, 0), scenes.boxes(EVERY, 1)
    apart = (one[:, :2] >= other[:, 2:] - 1e-4) | (other[:, :2] >= one[:, 2:] - 1e-4)  # along x, along y
    assert apart.any(1).all()
    assert 0.3 < apart[:, 0].float().mean() < 0.9
    assert 0.3 < apart[:, 1].float().mean() < 0.9
    for copy in (0, 1):
        ink = scenes.ink(EVERY, copy)
        assert (ink.flatten(1).amax(1) > 0.6).all(), "no copy is cut off"
    assert not ((scenes.ink(EVERY, 0) > 0) & (scenes.ink(EVERY, 1) > 0)).any()


def test_either_copy_may_come_first_and_both_reach_all_of_the_canvas() -> None:
    many = Digits("train", 3000, config=TWINS)
    rows = torch.arange(3000)
    for copy in (0, 1):
        boxes = many.boxes(rows, copy)
        assert (boxes[:, :2].amin(0) < 0.2).all()
        assert (boxes[:, 2:].amax(0) > 39.8).all()
    left = (many.boxes(rows, 0)[:, 0] < many.boxes(rows, 1)[:, 0]).float().mean()
    assert 0.45 < left < 0.55


def test_both_copies_are_the_same_digit(scenes: Digits) -> None:
    """Enlarged to one size, they look alike."""
    for index in range(20):
        pictures = []
        for copy in (0, 1):
            left, top, right, bottom = scenes.boxes([index], copy)[0].tolist()
            steps = (torch.arange(16) + 0.5) / 16
            x, y = (left + steps * (right - left)) / 20 - 1, (top + steps * (bottom - top)) / 20 - 1
            grid = torch.stack((x.expand(16, 16), y[:, None].expand(16, 16)), -1)[None]
            ink = scenes.ink([index], copy)[:, None]
            pictures.append(torch.nn.functional.grid_sample(ink, grid, align_corners=False).flatten())
        assert torch.corrcoef(torch.stack(pictures))[0, 1] > 0.9


def test_the_ink_of_the_scene_is_that_of_its_copies(scenes: Digits) -> None:
    assert torch.equal(scenes.ink(EVERY), scenes.ink(EVERY, 0) + scenes.ink(EVERY, 1))
    silent = Digits("train", 200, config=DigitsConfig(side=(13, 17), copies=2, noise=0, clutter=(0, 10)))
    images, _ = silent.batch(EVERY)
    intensity, pixels = silent.to_rgb(images), torch.arange(40) + 0.5
    for copy in (0, 1):  # no fragment in either box: every channel is the ink times the colour of the digit
        left, top, right, bottom = silent.boxes(EVERY, copy)[..., None].unbind(1)
        lines, columns = (pixels >= top) & (pixels <= bottom), (pixels >= left) & (pixels <= right)
        inside = (lines[:, :, None] & columns[:, None, :])[:, None]
        expected = silent.ink(EVERY, copy)[:, None] * silent._scenes.colour[..., None, None]
        assert torch.allclose(intensity * inside, expected * inside, atol=1e-5)


def test_a_scene_depends_on_split_seed_and_index_only(scenes: Digits) -> None:
    images, labels = scenes.batch(EVERY)
    assert torch.equal(Digits("train", 300, config=TWINS).batch(EVERY)[0], images)
    assert torch.equal(scenes[7][0], images[7])
    assert scenes[7][1] == labels[7]
    assert not torch.equal(Digits("train", 200, seed=1, config=TWINS).batch(EVERY)[0], images)


def test_scenes_of_the_same_digit_are_a_group(scenes: Digits) -> None:
    assert torch.equal(scenes.groups(EVERY), scenes.source_ids(EVERY))
    many = Digits("test", 3000, config=TWINS)
    assert len(many.groups(torch.arange(3000)).unique()) == 359


def test_the_shipped_network_reads_twins() -> None:
    images, labels = Digits("test", 200, config=TWINS).batch(EVERY)
    with torch.inference_mode():
        assert (load_backbone("vit_digits")(images).argmax(1) == labels).float().mean() > 0.96


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"copies": 0}, "copies: expected 1 or more, got 0"),
        ({"copies": 2}, "side: expected 2 copies that fit 40 px"),  # the sides of single digits
        ({"copies": 3, "side": (10.0, 13.0)}, "side: expected 3 copies that fit 40 px in a row, got 44.3"),
    ],
)
def test_impossible_copies_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DigitsConfig(**values)


def test_three_copies_fit_where_they_are_small() -> None:
    three = Digits("train", 50, config=DigitsConfig(copies=3, side=(8.0, 11.0)))
    rows = torch.arange(50)
    assert (three.sides(rows, 0) <= 9).all()
    assert (three.sides(rows, 2) >= 10).all()
    layers = torch.stack([three.ink(rows, copy) > 0 for copy in range(3)])
    assert int(layers.sum(0).max()) == 1
    with pytest.raises(IndexError, match="copy: expected 0 <= copy < 3, got 3"):
        three.boxes(rows, 3)
    with pytest.raises(IndexError, match="copy: expected 0 <= copy < 3, got -1"):
        three.ink(rows, -1)
