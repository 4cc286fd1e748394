from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vitprune_env.data.digits import SPLITS, Digits, DigitsConfig, _fragments

EVERY = torch.arange(64)


@pytest.fixture(scope="module")
def scenes() -> Digits:
    return Digits("train", 64)


def inside_boxes(scenes: Digits, rows: Tensor) -> Tensor:
    """[B, H, W] bool: pixel centres inside the digit's box, by hand from `boxes`."""
    pixels = torch.arange(scenes.config.canvas) + 0.5
    left, top, right, bottom = scenes.boxes(rows)[..., None].unbind(1)
    columns, lines = (pixels >= left) & (pixels <= right), (pixels >= top) & (pixels <= bottom)
    return lines[:, :, None] & columns[:, None, :]


def test_a_batch_has_images_and_labels_of_the_promised_shape(scenes: Digits) -> None:
    images, labels = scenes.batch(EVERY)
    assert images.shape == (64, 3, 40, 40)
    assert images.dtype == torch.float32
    assert labels.shape == (64,)
    assert labels.dtype == torch.int64
    assert labels.min() >= 0
    assert labels.max() < len(Digits.classes)
    assert torch.isfinite(images).all()


def test_an_item_alone_is_the_same_item_in_any_batch(scenes: Digits) -> None:
    images, labels = scenes.batch(EVERY)
    backwards, _ = scenes.batch(EVERY.flip(0))
    assert torch.equal(backwards.flip(0), images)
    for index in range(64):
        image, label = scenes[index]
        assert isinstance(label, int)
        assert torch.equal(image, images[index])
        assert label == labels[index]


def test_an_item_depends_on_split_seed_and_index_only() -> None:
    images, labels = Digits("test", 64, seed=3).batch(EVERY)
    again, same_labels = Digits("test", 64, seed=3).batch(EVERY)
    assert torch.equal(again, images)
    assert torch.equal(same_labels, labels)
    larger, _ = Digits("test", 200, seed=3).batch(EVERY)
    assert torch.equal(larger, images)


@pytest.mark.parametrize(("split", "seed"), [("test", 1), ("train", 0), ("validation", 0)])
def test_another_seed_or_split_gives_other_scenes(split: str, seed: int) -> None:
    reference, other = Digits("test", 64), Digits(split, 64, seed=seed)
    assert (reference.sides(EVERY) != other.sides(EVERY)).all()
    assert (reference.batch(EVERY)[0] != other.batch(EVERY)[0]).flatten(1).any(1).all()


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = Digits("train", 8).batch(EVERY[:8])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Digits("train", 8).batch(EVERY[:8])[0], first)


def test_splits_share_no_underlying_digit_and_cover_every_class() -> None:
    seen = {}
    for split in SPLITS:
        scenes = Digits(split, 20_000)
        rows = torch.arange(20_000)
        seen[split] = set(scenes.source_ids(rows).tolist())
        counts = scenes.batch(rows[:3000])[1].bincount(minlength=10)
        assert (counts - 300).abs().max() < 100, "every class about equally often"
    assert sum(len(ids) for ids in seen.values()) == len(set.union(*seen.values())) == 1797


def test_the_label_is_that_of_the_underlying_digit(scenes: Digits) -> None:
    targets = torch.as_tensor(load_digits(return_X_y=True)[1])
    assert torch.equal(scenes.batch(EVERY)[1], targets[scenes.source_ids(EVERY)].long())


def test_digit_sides_vary_by_a_factor_of_two_and_a_half() -> None:
    sides = Digits("train", 1000).sides(torch.arange(1000))
    assert sides.max() / sides.min() >= 2.5
    low, high = DigitsConfig().side
    assert low <= sides.min()
    assert sides.max() <= high


def test_ink_fills_its_box_and_stays_in_it(scenes: Digits) -> None:
    ink, inside = scenes.ink(EVERY), inside_boxes(scenes, EVERY)
    assert (ink[~inside] == 0).all()
    assert (ink.flatten(1).amax(1) > 0.6).all()
    lines = (ink > 0.05).any(2)
    heights = lines.sum(1)
    assert (heights > 0.7 * scenes.sides(EVERY)).all()
    assert (heights <= 1.4 * scenes.sides(EVERY)).all()


def test_clutter_is_never_over_the_digit() -> None:
    plain = Digits("train", 64, config=DigitsConfig(noise=0, clutter=(0, 10)))
    images, _ = plain.batch(EVERY)
    intensity = images * plain.config.std + plain.config.mean
    ink, inside = plain.ink(EVERY), inside_boxes(plain, EVERY)
    # Inside the box every channel is the ink times one colour: nothing was added to it.
    colour = (intensity * ink[:, None]).sum((2, 3)) / ink.square().sum((1, 2))[:, None]
    expected = colour[..., None, None] * ink[:, None]
    assert torch.allclose(intensity * inside[:, None], expected * inside[:, None], atol=1e-5)
    assert (intensity * ~inside[:, None]).flatten(1).amax(1).median() > 0.5, "there is clutter elsewhere"


def test_clutter_comes_from_other_digits() -> None:
    scenes = Digits("train", 5000)
    own = scenes._scenes.digit
    pieces, first = _fragments("train")
    fragment = scenes._scenes.fragment
    assert fragment.min() >= 0
    assert fragment.max() < len(pieces)
    owner = torch.searchsorted(first, fragment.flatten(), right=True).view_as(fragment) - 1
    assert (owner != own[:, None]).all()


def test_the_number_of_fragments_stays_in_its_range() -> None:
    present = (Digits("train", 2000)._scenes.fragment_colour.amax(2) > 0).sum(1)
    assert present.unique().tolist() == [6, 7, 8, 9, 10]


def test_every_image_has_noise_of_its_own() -> None:
    noisy, silent = (Digits("train", 64, config=DigitsConfig(noise=noise)).batch(EVERY)[0] for noise in (0.08, 0.0))
    noise = (noisy - silent) * DigitsConfig().std
    assert noise.std() == pytest.approx(0.08, rel=0.02)
    first, second = noise.flatten(1)[:-1], noise.flatten(1)[1:]
    for shift in (0, 1):
        product = first[:, shift:] * second[:, : second.shape[1] - shift]
        assert product.mean(1).abs().max() < 0.1 * 0.08**2, "not the neighbour's noise, nor that shifted"


def test_useful_patches_differ_from_image_to_image() -> None:
    scenes = Digits("validation", 500)
    inked = (F.avg_pool2d(scenes.ink(torch.arange(500))[:, None], 4) > 0.02).flatten(1).sum(1).float()
    assert inked.std() > 0.3 * inked.mean()


def test_normalisation_is_undone_for_display(scenes: Digits) -> None:
    images, _ = scenes.batch(EVERY)
    shown = scenes.to_rgb(images)
    assert shown.min() >= 0
    assert shown.max() <= 1
    clipped = (images * 0.3 + 0.15).clamp(0, 1)
    assert torch.allclose(shown, clipped)


def test_scenes_keep_their_look_on_another_canvas() -> None:
    large = Digits("train", 64, config=DigitsConfig(noise=0).resized(120))
    small = Digits("train", 64, config=DigitsConfig(noise=0))
    images, shrunk = small.batch(EVERY)[0], F.avg_pool2d(large.batch(EVERY)[0], 3)
    assert shrunk.shape == images.shape
    assert (shrunk - images).abs().mean() < 0.1 * images.std()


def test_augmentation_bends_the_digit_inside_its_box() -> None:
    bent = Digits("train", 64, config=DigitsConfig(warp=0.15, shear=0.2))
    straight = Digits("train", 64)
    assert torch.equal(bent.boxes(EVERY), straight.boxes(EVERY))
    assert (bent.ink(EVERY) != straight.ink(EVERY)).flatten(1).any(1).all()
    assert (bent.ink(EVERY)[~inside_boxes(bent, EVERY)] == 0).all()


@pytest.mark.parametrize(("name", "most"), [("warp", 0.15), ("shear", 0.2), ("angle", 0.1)])
def test_digits_are_bent_and_turned_either_way(name: str, most: float) -> None:
    drawn = getattr(Digits("train", 1000, config=DigitsConfig(warp=0.15, shear=0.2))._scenes, name)
    assert -most <= drawn.min() < -0.98 * most
    assert 0.98 * most < drawn.max() <= most
    assert abs(drawn.mean()) < 0.1 * most


def test_a_data_loader_reads_it() -> None:
    scenes = Digits("validation", 10)
    images, labels = zip(*DataLoader(scenes, batch_size=4), strict=True)
    together = scenes.batch(range(10))
    assert torch.equal(torch.cat(images), together[0])
    assert torch.equal(torch.cat(labels), together[1])
    assert len(list(scenes)) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "valid"}, ["split", "validation", "'valid'"]),
        ({"size": 0}, ["size", "at least 1", "0"]),
        ({"size": -3}, ["size", "-3"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        Digits(**{"split": "train", "size": 4, **arguments})


@pytest.mark.parametrize("index", [4, -1])
def test_an_index_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=rf"0 <= index < 4.*{index}"):
        Digits("train", 4)[index]
    with pytest.raises(IndexError):
        Digits("train", 4).batch([0, index])


@pytest.mark.parametrize(
    "values", [{"side": (12.0, 45.0)}, {"side": (30.0, 12.0)}, {"gain": (-1.0, 1.0)}, {"noise": -0.1}, {"std": 0.0}]
)
def test_an_impossible_look_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DigitsConfig(**values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"canvas": float("nan")},
        {"canvas": 40.5},
        {"side": 3},
        {"clutter": (1, float("inf"))},
        {"tint": -1},
        {"noise": "x"},
    ],
)
def test_appearance_is_of_finite_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        DigitsConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"size": 2.5}, {"size": 2, "seed": 1.5}, {"size": 2, "seed": 2**70}])
def test_sizes_and_seeds_are_whole(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^(size|seed): expected"):
        Digits("train", **wrong)
