"""The built-in tasks: real handwritten digits, somewhere on a canvas full of fragments of other digits.

The digits differ in size and place, so the useful patches differ from image to image. Because of the fragments, a patch
with ink is not necessarily a useful one. In the task `digits` a scene has one digit. In `twins` it has two copies of
the same one, of different sizes. One copy is enough to read the digit, so where tokens are scarce they should all be of
the same copy, and a token cannot see alone which one that is.

Everything random about a scene is drawn at construction from one generator. A scene is a pure function of (split, seed,
index): it depends neither on its batch nor on the size of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from vitprune_env.data.batches import whole_numbers

SPLITS = ("train", "validation", "test")
SPLIT_ENDS = (0.65, 0.80, 1.0)  # cumulative shares of the underlying digits of each class
SOURCE = 8  # side of a source digit, in source pixels
FRAGMENT = 3  # side of a clutter fragment, in source pixels
FRAGMENT_MIN_INK = 0.35  # mean ink below which a fragment would hardly be visible
BLEED = 1 + 1 / SOURCE  # bilinear sampling bleeds half a source pixel over each edge
COLUMNS, FRAGMENT_COLUMNS = 30, 8  # uniform numbers that a scene and each of its fragments take
COPY_COLUMNS = 8  # what each further copy of the digit takes at most
NOISE_STARTS = 1 << 16  # places where an image's noise may start in the noise bank
NOISE_STREAM = 1 << 40  # keeps the seeds of the noise apart from those of the scenes


@dataclass(frozen=True)
class DigitsConfig:
    """Appearance of the scenes. Lengths are in pixels of the canvas, angles in radians, intensities in [0, 1].

    Attributes:
        canvas: Height and width of the image.
        side: Smallest and largest side of the digit; copies divide this range evenly, so that no two are of one size.
        rotation: Largest rotation of the digit, either way.
        shear: Largest horizontal shear of the digit, either way (0 except for augmentation).
        warp: Largest elastic displacement of the digit, as a share of half its side (0 except for augmentation).
        gain: Dimmest and brightest object.
        tint: Largest share by which an object's colour channels are dimmed, independently.
        noise: Standard deviation of the pixel noise.
        clutter: Fewest and most fragments of other digits.
        clutter_side: Smallest and largest side of a fragment.
        mean: Intensity that becomes 0 in the normalised image.
        std: Intensity difference that becomes 1 in the normalised image.
        copies: How often the digit is in the scene. The copies differ in size and place, and do not overlap.
    """

    canvas: int = 40
    side: tuple[float, float] = (13.0, 33.0)
    rotation: float = 0.1
    shear: float = 0.0
    warp: float = 0.0
    gain: tuple[float, float] = (0.7, 1.0)
    tint: float = 0.25
    noise: float = 0.08
    clutter: tuple[int, int] = (6, 10)
    clutter_side: tuple[float, float] = (5.0, 10.0)
    mean: float = 0.15
    std: float = 0.3
    copies: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            value, several, kind = getattr(self, each.name), "tuple" in str(each.type), "int" in str(each.type)
            parts = value if several and isinstance(value, tuple | list) else (value,)
            fine = [isinstance(part, Integral if kind else Real) and not isinstance(part, bool) for part in parts]
            if not all(fine) or len(parts) != (2 if several else 1) or not all(map(math.isfinite, parts)):
                wanted = ("whole numbers" if kind else "finite numbers") if several else "a number"
                raise ValueError(f"{each.name}: expected {'two ' * several}{wanted}, got {value!r}")
        for name in ("side", "gain", "clutter", "clutter_side"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name}: expected 0 <= low <= high, got {(low, high)}")
        turned = math.cos(self.rotation) + math.sin(abs(self.rotation))  # how much wider rotation makes a digit
        largest = self.side[1] * turned
        if self.side[0] <= 0 or largest > self.canvas:
            raise ValueError(f"side: expected digits that fit {self.canvas} px, got {self.side}, rotated {largest:.1f}")
        if self.noise < 0 or self.std <= 0:
            raise ValueError(f"noise, std: expected noise >= 0 and std > 0, got {self.noise} and {self.std}")
        if not 0 <= self.tint <= 1:
            raise ValueError(f"tint: expected 0 to 1, got {self.tint}")
        if self.copies < 1:
            raise ValueError(f"copies: expected 1 or more, got {self.copies}")
        low, high = self.side
        row = (self.copies * low + (self.copies + 1) / 2 * (high - low)) * turned * BLEED  # all copies at their largest
        if self.copies > 1 and row > self.canvas:
            raise ValueError(f"side: expected {self.copies} copies that fit {self.canvas} px in a row, got {row:.1f}")

    def resized(self, canvas: int) -> DigitsConfig:
        """The same scenes on another canvas (pixels): all lengths scale with it."""
        scale = canvas / self.canvas
        side, clutter_side = ((low * scale, high * scale) for low, high in (self.side, self.clutter_side))
        return replace(self, canvas=canvas, side=side, clutter_side=clutter_side)


DIGITS = DigitsConfig()
TWINS = DigitsConfig(side=(13.0, 17.0), copies=2)
TASKS = {"digits": DIGITS, "twins": TWINS}  # by the names that commands know


@dataclass(frozen=True)
class _Scenes:
    """The parameters of S scenes with C copies of a digit and up to K fragments each."""

    digit: Tensor  # [S] int64, row in the split's source digits
    side: Tensor  # [S, C], the smallest copy first
    angle: Tensor  # [S]
    shear: Tensor  # [S]
    warp: Tensor  # [S, 2, 3, 3], displacement at a 3x3 lattice over the digit
    centre: Tensor  # [S, C, 2], x and y
    half_box: Tensor  # [S, C], half the side of the box that holds all ink
    colour: Tensor  # [S, 3]
    fragment: Tensor  # [S, K] int64, row in the split's fragments
    fragment_side: Tensor  # [S, K]
    fragment_corner: Tensor  # [S, K, 2], x and y of the top left corner
    fragment_colour: Tensor  # [S, K, 3], zero where the scene has fewer fragments
    noise_start: Tensor  # [S] int64


@lru_cache(maxsize=1)
def _source() -> tuple[Tensor, Tensor]:
    """All source digits `[1797, 8, 8]` in [0, 1] and their labels `[1797]` (UCI, shipped with scikit-learn)."""
    from sklearn.datasets import load_digits  # imported here because only this task needs scikit-learn

    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    return pixels.float().unflatten(1, (SOURCE, SOURCE)) / pixels.max(), labels.long()


@lru_cache(maxsize=len(SPLITS))
def _split_ids(split: str) -> Tensor:
    """Rows of the source digits that belong to `split`; the same share of each class, always the same rows."""
    labels = _source()[1]
    generator = torch.Generator().manual_seed(0)
    which = SPLITS.index(split)
    ids = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cuts = [0, *(round(end * len(rows)) for end in SPLIT_ENDS)]
        ids.append(rows[cuts[which] : cuts[which + 1]])
    return torch.cat(ids)


@lru_cache(maxsize=len(SPLITS))
def _fragments(split: str) -> tuple[Tensor, Tensor]:
    """Inked fragments `[P, 3, 3]` of the split's digits, and the first row of each digit `[len(split) + 1]`."""
    pieces = _source()[0][_split_ids(split)].unfold(1, FRAGMENT, 1).unfold(2, FRAGMENT, 1).flatten(1, 2)
    inked = pieces.mean((-1, -2)) >= FRAGMENT_MIN_INK  # [digits, positions]
    return pieces[inked], F.pad(inked.sum(1).cumsum(0), (1, 0))


class _Uniform:
    """Uniform numbers, taken column by column from one `[S, columns]` table, so that row i is the same for every S."""

    def __init__(self, size: int, columns: int, generator: torch.Generator) -> None:
        self.rest = torch.rand(size, columns, generator=generator)

    def __call__(self, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        count = math.prod(shape)
        taken, self.rest = self.rest[:, :count], self.rest[:, count:]
        return low + (high - low) * taken.reshape(-1, *shape)


def _draw(split: str, size: int, config: DigitsConfig, generator: torch.Generator) -> _Scenes:
    """Draw the parameters of `size` scenes."""
    most, copies = config.clutter[1], config.copies
    columns = COLUMNS + FRAGMENT_COLUMNS * most + COPY_COLUMNS * (copies - 1)
    uniform = _Uniform(size, columns, generator)
    pieces, first = _fragments(split)

    digit = uniform(0, len(first) - 1, 1).long().flatten()
    part = (torch.arange(copies) + uniform(0, 1, copies)) / copies  # of the range of sides, [S, C]
    side = config.side[0] + (config.side[1] - config.side[0]) * part
    angle = uniform(-config.rotation, config.rotation, 1).flatten()
    half = side / 2 * (angle.cos() + angle.sin().abs())[:, None]  # of the rotated digit
    # Fragments come from other digits: counting starts behind the rows of the scene's own digit and leaves these out.
    own = first[digit + 1] - first[digit]
    step = uniform(0, (len(pieces) - own)[:, None].float(), most).long()
    count = uniform(config.clutter[0], most + 1, 1)
    fragment_side = uniform(*config.clutter_side, most)
    present = torch.arange(most) < count.long()
    return _Scenes(
        digit=digit,
        side=side,
        angle=angle,
        shear=uniform(-config.shear, config.shear, 1).flatten(),
        warp=uniform(-config.warp, config.warp, 2, 3, 3),
        centre=_apart(
            uniform(half[..., None], config.canvas - half[..., None], copies, 2), half, config.canvas, uniform
        ),
        half_box=half * BLEED,
        colour=uniform(*config.gain, 1) * uniform(1 - config.tint, 1, 3),
        fragment=(first[digit + 1][:, None] + step) % len(pieces),
        fragment_side=fragment_side,
        fragment_corner=uniform(0, 1, most, 2) * (config.canvas - fragment_side)[..., None],
        fragment_colour=present[..., None] * uniform(*config.gain, most, 1) * uniform(1 - config.tint, 1, most, 3),
        noise_start=uniform(0, NOISE_STARTS, 1).long().flatten(),
    )


def _apart(centre: Tensor, half: Tensor, canvas: int, uniform: _Uniform) -> Tensor:
    """Centres `[S, C, 2]` of copies that do not overlap: along one axis, x or y, their boxes stand in a random row."""
    copies = half.shape[1]
    if copies == 1:
        return centre
    axis = uniform(0, 2, 1).long()  # [S, 1]
    order = uniform(0, 1, copies).argsort(1)
    box = (2 * BLEED * half).gather(1, order)
    free = canvas - box.sum(1, keepdim=True)  # divided at random among the spaces before, between and after the boxes
    along = free * uniform(0, 1, copies).sort(1).values + box.cumsum(1) - box / 2
    return torch.where(axis[..., None] == torch.arange(2), along.gather(1, order.argsort(1))[..., None], centre)


def _digit_layer(digits: Tensor, scenes: _Scenes, rows: Tensor, copy: int, canvas: int) -> Tensor:
    """Ink `[B, H, W]` of one copy of the scenes' own digits; exactly 0 outside its box."""
    pixels = torch.arange(canvas) + 0.5
    dx = pixels[None, None, :] - scenes.centre[rows, copy, 0, None, None]
    dy = pixels[None, :, None] - scenes.centre[rows, copy, 1, None, None]
    cos, sin = scenes.angle[rows].cos()[:, None, None], scenes.angle[rows].sin()[:, None, None]
    half = scenes.side[rows, copy][:, None, None] / 2
    v = (cos * dy - sin * dx) / half
    u = (cos * dx + sin * dy) / half + scenes.shear[rows][:, None, None] * v
    grid = torch.stack((u, v), -1)
    warp = scenes.warp[rows]
    if warp.any():
        grid = grid + F.grid_sample(warp, grid, padding_mode="border", align_corners=True).movedim(1, -1)
    ink = F.grid_sample(digits[scenes.digit[rows]][:, None], grid, align_corners=False)[:, 0]
    return ink * _inside(scenes, rows, canvas)[:, copy]


def _inside(scenes: _Scenes, rows: Tensor, canvas: int) -> Tensor:
    """`[B, C, H, W]` bool, pixels whose centres are inside the boxes of the copies."""
    pixels = torch.arange(canvas) + 0.5
    near = (pixels - scenes.centre[rows][..., None]).abs() <= scenes.half_box[rows][
        ..., None, None
    ]  # [B, C, 2, canvas]
    return near[:, :, 1, :, None] & near[:, :, 0, None, :]


def _clutter_layer(fragments: Tensor, scenes: _Scenes, rows: Tensor, canvas: int) -> Tensor:
    """Coloured fragments `[B, 3, H, W]`, enlarged bilinearly.

    Bilinear weights are a product of a hat function of the row and one of the column, so that enlarging all fragments
    of an image is two matrix products.
    """
    pixels = torch.arange(canvas) + 0.5
    scale = FRAGMENT / scenes.fragment_side[rows][:, :, None, None]
    source = (pixels - scenes.fragment_corner[rows][..., None]) * scale - 0.5  # [B, K, 2, canvas], in source pixels
    hats = (1 - (source[..., None] - torch.arange(FRAGMENT)).abs()).clamp(min=0)  # [B, K, 2, canvas, 3]
    strips = fragments[scenes.fragment[rows]] @ hats[:, :, 0].mT  # [B, K, 3, W]
    coloured = strips[:, None] * scenes.fragment_colour[rows].mT[..., None, None]  # [B, 3, K, 3, W]
    columns = hats[:, :, 1].transpose(1, 2).flatten(2)  # [B, H, K * 3]
    return (columns[:, None] @ coloured.flatten(2, 3)).clamp(max=1)


class Digits(Dataset[tuple[Tensor, int]]):
    """Scenes with one digit each, drawn from the underlying digits of one split.

    The splits share no underlying digit, whatever the seeds. `ds[i]` is `(image [3, H, W] float32, label)`, normalised
    as the built-in model expects; `ds.batch(rows)` is the same for many scenes at once, and much faster.

    Args:
        split: "train", "validation" or "test".
        size: Number of scenes, at least 1. Scene i does not depend on it.
        seed: Any non-negative integer; another seed gives other scenes.
        config: Appearance of the scenes.

    Raises:
        ValueError: If the split is unknown, the data set is empty or the seed is negative.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, size: int, seed: int = 0, config: DigitsConfig = DigitsConfig()) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        size, seed = (whole_numbers(name, [value])[0] for name, value in (("size", size), ("seed", seed)))
        if size < 1:
            raise ValueError(f"size: expected at least 1 scene, got {size} (an empty data set)")
        if not 0 <= seed < 2**48:
            raise ValueError(f"seed: expected a non-negative integer below 2^48, got {seed}")
        self.split, self.size, self.seed, self.config = split, size, seed, config
        stream = len(SPLITS) * seed + SPLITS.index(split)
        pixels = 3 * config.canvas**2
        generator = torch.Generator().manual_seed(stream + NOISE_STREAM)
        noise = config.noise * torch.randn(NOISE_STARTS + pixels, generator=generator)
        self._noise = noise.unfold(0, pixels, 1)  # [NOISE_STARTS + 1, pixels], a view
        self._scenes = _draw(split, size, config, torch.Generator().manual_seed(stream))
        self._source_ids = _split_ids(split)
        self._digits = _source()[0][self._source_ids]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Draw many scenes at once.

        Args:
            indices: Scene numbers `[B]`, each in `0 .. len(self) - 1`.

        Returns:
            Normalised images `[B, 3, H, W]` float32 and labels `[B]` int64.

        Raises:
            IndexError: If an index is out of range (negative ones are).
            TypeError: For a mask, or numbers that are not whole.
        """
        rows, scenes, canvas = self._rows(indices), self._scenes, self.config.canvas
        image = self.ink(rows)[:, None] * scenes.colour[rows][..., None, None]
        clutter = _clutter_layer(_fragments(self.split)[0], scenes, rows, canvas)
        image += clutter * ~_inside(scenes, rows, canvas).any(1, keepdim=True)
        image += self._noise[scenes.noise_start[rows]].view_as(image)
        return (image - self.config.mean) / self.config.std, _source()[1][self.source_ids(rows)]

    def ink(self, indices: Sequence[int] | Tensor, copy: int | None = None) -> Tensor:
        """The digits alone, `[B, H, W]` in [0, 1], without gain, clutter and noise; for oracles and figures.

        Args:
            indices: Scene numbers `[B]`.
            copy: Which copy to draw, 0 for the smallest; None: all.

        Raises:
            IndexError: If an index or the copy is out of range.
        """
        rows, canvas = self._rows(indices), self.config.canvas
        copies = range(self.config.copies) if copy is None else [self._copy(copy)]
        layers = [_digit_layer(self._digits, self._scenes, rows, each, canvas) for each in copies]
        return reduce(torch.add, layers)

    def boxes(self, indices: Sequence[int] | Tensor, copy: int = 0) -> Tensor:
        """Boxes `[B, 4]` (left, top, right, bottom; pixels) that hold all ink of a copy of the digit and no fragment.

        Copies are numbered by size, from 0 for the smallest.
        """
        rows, copy = self._rows(indices), self._copy(copy)
        centre, half = self._scenes.centre[rows, copy], self._scenes.half_box[rows, copy][:, None]
        return torch.cat((centre - half, centre + half), 1)

    def sides(self, indices: Sequence[int] | Tensor, copy: int = 0) -> Tensor:
        """Sides `[B]` of a copy of the digits, in pixels, before rotation; copy 0 is the smallest."""
        return self._scenes.side[self._rows(indices), self._copy(copy)]

    def source_ids(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The underlying digit of each scene, `[B]` int64: its row in scikit-learn's `load_digits`."""
        return self._source_ids[self._scenes.digit[self._rows(indices)]]

    def groups(self, indices: Sequence[int] | Tensor) -> Tensor:
        """What scenes have in common beyond their class, `[B]` int64: their underlying digits, for standard errors."""
        return self.source_ids(indices)

    def to_rgb(self, images: Tensor) -> Tensor:
        """Undo the normalisation of `images [..., 3, H, W]`: intensities in [0, 1], for display."""
        return (images * self.config.std + self.config.mean).clamp(0, 1)

    def _rows(self, indices: Sequence[int] | Tensor) -> Tensor:
        rows = torch.as_tensor(indices)
        if len(rows) and (rows.is_floating_point() or rows.dtype == torch.bool):
            raise TypeError(f"index: expected whole numbers, got {rows.dtype}")
        rows = rows.long()
        if ((rows < 0) | (rows >= self.size)).any():
            raise IndexError(f"index: expected 0 <= index < {self.size}, got {rows.tolist()}")
        return rows

    def _copy(self, copy: int) -> int:
        if not 0 <= copy < self.config.copies:
            raise IndexError(f"copy: expected 0 <= copy < {self.config.copies}, got {copy}")
        return copy
