"""Flags that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import tyro

from vitprune_env.cli.flags.run_folder import make_way, store_words

if TYPE_CHECKING:
    from vitprune_env.benchmarking.images import Batches
    from vitprune_env.data import Digits, ImageFiles
    from vitprune_env.engine.backbone import Backbone

T = TypeVar("T")
TaskName = Literal["digits", "twins"]  # keys of `vitprune_env.data.TASKS`, which would import torch
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
TUNE_SEED = 1_000_003  # scenes to calibrate on: training digits, other compositions than those of training
TEST_SEED = 2_000_003  # scenes to report on
VALIDATION_SEED = 3_000_003  # scenes to watch training on


@dataclass(frozen=True)
class OutputFlags:
    """Flags of everything that writes results."""

    output: Folder = Path("runs/latest")
    """Folder for results; made if it does not exist. Without this flag its name says what runs: runs/ppo_single,
    runs/mappo-twins-0.2, runs/mappo-quick, ..."""
    seed: int = 0
    """Seed of everything random: data, initial weights, exploration."""
    quick: bool = False
    """A small run that shows that everything works; its numbers mean nothing."""

    def make_folder(self) -> None:
        """Make the output folder.

        Raises:
            StorageError: if it cannot be made.
        """
        from vitprune_env.errors import StorageError

        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"output: expected a folder, got {self.output} ({error.strerror})") from error


@dataclass(frozen=True)
class DeviceFlags:
    """Flags of everything that runs a network."""

    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads; None: one for the built-in model, which is too small for more, and torch's choice for others."""

    def check_device(self) -> None:
        """Refuse a device that is not there.

        Raises:
            SettingsError: naming it.
        """
        import torch

        from vitprune_env.errors import SettingsError

        try:
            torch.zeros(1, device=self.device).item()  # "meta" has shapes alone
        except (RuntimeError, AssertionError) as error:  # torch built without this kind of device asserts
            reason = str(error).splitlines()[0]
            raise SettingsError(f"device: expected one that torch finds, got {self.device!r} ({reason})") from error

    def set_threads(self, built_in: bool) -> None:
        """Set the number of CPU threads, which may depend on whether the network is the built-in one."""
        import torch

        threads = 1 if self.threads is None and built_in else self.threads
        if threads is not None:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class CommonFlags(DeviceFlags, OutputFlags):
    """Flags of everything that runs a network and writes results."""

    def prepare(self, built_in: bool = True) -> None:
        """Make the output folder and set the number of threads.

        Args:
            built_in: whether the network is the built-in one.

        Raises:
            StorageError: if the folder cannot be made.
            SettingsError: for a device that is not there.
        """
        self.check_device()
        self.make_folder()
        self.set_threads(built_in)


@dataclass(frozen=True)
class ResumableFlags(CommonFlags):
    """Flags of what takes long: its folder is never overwritten silently, and what lies there can be continued."""

    resume: bool = False
    """Go on from what lies in the output folder, with the flags it was started with; on an empty folder this starts
    fresh."""
    overwrite: bool = False
    """Replace the run that lies in the output folder."""
    words: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = field(default=(), repr=False, compare=False)
    """The command line that all flags were read from; it is kept in the folder, for `--resume`."""

    def prepare(self, built_in: bool = True, results: Sequence[str] = ()) -> None:
        """Make the output folder and set the number of threads.

        Args:
            built_in: whether the network is the built-in one.
            results: files that a run of this command leaves in its folder, the one that is written last first. Where
                one of them lies in the folder, it is refused without `resume` or `overwrite`.

        Raises:
            StorageError: if the folder cannot be made.
            SettingsError: for a device that is not there, or a folder that holds a run.
        """
        from vitprune_env.errors import SettingsError

        self.check_device()
        if self.resume and self.overwrite:
            raise SettingsError("overwrite: expected either --resume or --overwrite, got both")
        self.make_folder()
        if results:
            if not self.resume:
                make_way(self.output, results, self.overwrite, self.quick)
            store_words(self.output, self.words)
        self.set_threads(built_in)


@dataclass(frozen=True)
class TargetFlags:
    """What a policy may cost on average, its own MACs included; give at most one of these."""

    target_share: float | None = None
    """Budget as a share of the dense network's MACs."""
    target_gmacs: float | None = None
    """Budget in GMACs per image."""
    target_keep: float | None = None
    """Budget as a keep rate: what keeping this fraction of the tokens at every site costs."""

    def one(self, usual: TargetFlags) -> TargetFlags:
        """The budget that is given, or else the usual one.

        Args:
            usual: what these flags are where none is given.

        Raises:
            SettingsError: for more than one budget.
        """
        from vitprune_env.errors import SettingsError

        given = {name: value for name, value in vars(self).items() if value != getattr(usual, name)}
        if len(given) > 1:
            raise SettingsError(f"{', '.join(given)}: expected one of them, got {len(given)}")
        return TargetFlags(**given) if given else usual

    def gmacs(self, backbone: Backbone, sites: Sequence[str] = ()) -> float:
        """The budget in GMACs per image.

        Args:
            backbone: the network that is pruned.
            sites: where a keep rate counts; none: the network's own sites.
        """
        from vitprune_env.agents.budgets.targets import PolicyCost
        from vitprune_env.engine.cost import CostModel
        from vitprune_env.types import parse_sites

        if self.target_gmacs is not None:
            return self.target_gmacs
        cost = CostModel.of(backbone)
        if self.target_share is not None:
            return self.target_share * cost.dense() / 1e9
        places = parse_sites(sites or backbone.default_sites, backbone.depth)
        return PolicyCost(cost, places, 0).at_keep_rate(self.target_keep or 1.0) / 1e9


@dataclass(frozen=True)
class ImageFlags:
    """Which network, and which images; without any of these the built-in task: handwritten digits, network included."""

    task: TaskName = "digits"
    """Built-in task: one digit in each scene, or twins, two copies of it of which one is enough."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Images to use instead of the built-in task: class folders, directly or under train and val."""
    dataset: str = ""
    """timm's name of the dataset, such as torch/cifar10 or hfds/ILSVRC/imagenet-1k; empty: folders."""
    class_map: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File that lists the class names in the order of the network's head; needed where the network knows no names and
    the images are numbered otherwise, or show fewer classes."""
    download: bool = False
    """Let torchvision download the dataset (torch/...)."""
    on_corrupt: Literal["skip", "fail"] = "skip"
    """What to do about image files that cannot be read; they are named either way."""
    workers: int = 2
    """Processes (or threads) that decode images."""
    model: str | None = None
    """Network to prune: vit_digits, lv_vit_s, any plain ViT of timm, hf:FOLDER for one that transformers saved, or
    FILE.py:NAME for a function of your own that builds one; None: that of the weight file or of the policy, or
    vit_digits."""
    pretrained: bool = False
    """Let timm download the network's weights, unless a file is given."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Local weights of the network instead: .pth, .safetensors or .npz."""
    img_size: int | None = None
    """Height and width of the images, in pixels; None: that of the weight file, or the network's own. Position
    embeddings are interpolated."""
    num_classes: int | None = None
    """Classes of the network; None: those of the weight file, or its own, 1000 for ImageNet."""

    @property
    def reads_files(self) -> bool:
        """Whether images come from files, not from the built-in task."""
        return self.data_dir is not None or bool(self.dataset)

    def network(self, seed: int, device: str, default: str = "vit_digits") -> Backbone:
        """The network of the flags, by default the one called `default`.

        Raises:
            SettingsError: for a network that cannot classify the built-in task where no images are given, or a
                built-in task beside image files.
        """
        import torch

        from vitprune_env.errors import SettingsError
        from vitprune_env.models.load import about_weights, folder_of, is_registered, is_timm_name, load_backbone

        written = "" if self.weights is None else about_weights(self.weights).get("architecture", "")
        own = own_network(self.model)
        name = own or self.model or (written if is_registered(written) or is_timm_name(written) else default)
        if self.reads_files and self.task != "digits":
            files = self.data_dir or self.dataset
            raise SettingsError(f"task: expected no built-in task beside image files ({files}), got {self.task!r}")
        if not self.reads_files and name != "vit_digits":
            raise SettingsError(f"data_dir: expected images for {name}; only vit_digits reads the built-in task")
        options = {"img_size": self.img_size, "num_classes": self.num_classes}
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        pretrained = self.pretrained and self.weights is None
        brings_weights = own is not None or name == "vit_digits" or folder_of(name) is not None
        if not (pretrained or self.weights is not None or brings_weights):
            print(f"note: {name} has random weights; --pretrained downloads them, --weights reads a file")
        torch.manual_seed(seed)
        return load_backbone(name, pretrained, self.weights, **given).to(device)

    def held_out_split(self, split: str | None) -> str:
        """The split to report on: the asked one, else test of the built-in task and validation of image files."""
        return split or ("validation" if self.reads_files else "test")

    def batches(self, backbone: Backbone, split: str, count: int | None, seed: int, size: int, device: str) -> Batches:
        """Labelled images of a split, see `open`, in batches of at most `size` on a device."""
        import torch

        from vitprune_env.benchmarking.images import as_batches

        return as_batches(self.open(backbone, split, count, seed), size, torch.device(device))

    def open(self, backbone: Backbone, split: str, count: int | None, seed: int) -> Digits | ImageFiles:
        """Images of a split.

        Args:
            backbone: the network that they are prepared for.
            split: train, validation or test.
            count: how many; None: 2000 scenes of the built-in task, all image files.
            seed: which scenes of the built-in task, or which of the files, evenly over the classes.

        Raises:
            SettingsError: for a count below 1.
            ValueError: for images that cannot be opened or do not fit the network.
        """
        from vitprune_env.data import TASKS, Digits, open_images

        _check_count(split, count)
        if not self.reads_files:
            return Digits(split, count or 2000, seed, TASKS[self.task])
        return open_images(
            backbone,
            self.data_dir,
            split,
            self.dataset,
            self.class_map,
            self.download,
            on_corrupt=self.on_corrupt,
            limit=count,
            seed=seed,
            workers=self.workers,
        )

    def open_apart(self, backbone: Backbone, *parts: tuple[str, int | None, int]) -> list[Digits | ImageFiles]:
        """Images for several purposes, none of them for two, also where two splits are the same files.

        Args:
            backbone: the network that they are prepared for.
            *parts: split, count and seed of each, see `open`. Of the same files each part but the last gets at most a
                quarter of what those before it leave.
        """
        for split, count, _ in parts:
            _check_count(split, count)
        if not self.reads_files:
            return [self.open(backbone, *part) for part in parts]
        whole = {split: cast("ImageFiles", self.open(backbone, split, None, 0)) for split, _, _ in parts}
        _check_alike(whole)
        places = {split: split if self.dataset else files.source.reader.root for split, files in whole.items()}
        left = {places[split]: files for split, files in whole.items()}
        found: list[Digits | ImageFiles] = []
        for index, (split, count, seed) in enumerate(parts, start=1):
            files = left[places[split]]
            shared = any(places[other] == places[split] for other, _, _ in parts[index:])
            most = max(1, len(files) // 4) if shared else len(files)
            count = most if count is None else min(count, most)
            if count < len(files):
                files, left[places[split]] = files.split(count, seed)
            found.append(files)
        return found


def own_network(model: str | None) -> str | None:
    """The name of a network of the user's own, which a function builds, given as FILE.py:NAME or package.module:NAME.

    Returns:
        NAME, which stands for the network from now on and in files; None: the text names no such function.

    Raises:
        SettingsError: for a function that cannot be imported.
        ValueError: for a name of timm or of this package.
    """
    from vitprune_env.benchmarking.contestants import load_object
    from vitprune_env.models.load import register_backbone

    place, _, name = (model or "").rpartition(":")
    if not name.isidentifier() or not (place.endswith(".py") or "." in place):  # hf:FOLDER
        return None
    register_backbone(name, load_object(model or "", "model"))
    return name


def _check_alike(parts: Mapping[str, ImageFiles]) -> None:
    """Refuse splits whose classes differ: their numbers would mean different classes."""
    from vitprune_env.errors import SettingsError

    (first, files), *others = parts.items()
    for split, other in others:
        if different := set(files.class_names or ()) ^ set(other.class_names or ()):
            raise SettingsError(
                f"data_dir: expected the same classes in {first} and {split}, but {', '.join(sorted(different)[:3])} "
                "are in one of them alone; a network that knows the names of its classes, or a class_map, numbers them"
            )


def _check_count(split: str, count: int | None) -> None:
    from vitprune_env.errors import SettingsError

    if count is not None and count < 1:
        raise SettingsError(f"images: expected 1 or more of split {split}, got {count}")


def lowered(flags: T, **most: Any) -> T:
    """The same flags with numbers of at most these; one that is None, for all there are, becomes this.

    Args:
        flags: a dataclass.
        **most: the largest values by the names of its fields.
    """
    given = {name: getattr(flags, name) for name in most}
    less = {name: most[name] if value is None else min(value, most[name]) for name, value in given.items()}
    return replace(cast(Any, flags), **less)


def named_sites(sites: tuple[str, ...], *words: str) -> Any:
    """What `--sites` stands for: one of these words by itself, or sites."""
    return sites[0] if len(sites) == 1 and sites[0] in words else sites
