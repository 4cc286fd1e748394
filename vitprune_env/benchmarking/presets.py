"""Baselines on stock networks: settings to measure with, and the numbers that papers printed where they printed any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vitprune_env.baselines import available


@dataclass(frozen=True)
class Published:
    """A method on a stock network, at a keep rate, a number of GMACs or a share of dense, and what a paper printed."""

    model: str  # name in timm
    policy: str  # name in the registry of baselines
    keep_rate: float | None = None  # None: the method is brought to the budget
    gmacs: float | None = None  # the budget; beside a keep rate what the paper prints
    top1: float | None = None  # printed, per cent; None: no paper prints it
    source: str = ""  # where it is printed, and how the network was trained there; empty: nowhere
    share: float | None = None  # the budget as a share of dense
    img_size: int | None = None  # None: the network's own
    pretrained: bool = True  # False: timm has no weights with a head, a file has to be given


DEIT_S, DEIT_B, LV_VIT_S = "deit_small_patch16_224", "deit_base_patch16_224", "lv_vit_s"
AUGREG_S, DINOV2_S = "vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_small_patch14_dinov2"
AS_IT_IS, TABLE_2 = "RL4EViT, Table I, no fine-tuning", "RL4EViT, Table II"
SCRATCH, MERGERS = "Long et al., 2023, Table 1, trained from scratch", "Long et al., 2023, Table 4"
LIFE_1, LIFE_2 = "Chen et al., Table I, fine-tuned", "Chen et al., Table II, fine-tuned"

# What is printed at a keep rate that we know; the others are brought to the printed GMACs.
AT_KEEP_RATE: dict[str, Published] = {
    "evit-deit-s-0.8": Published(DEIT_S, "evit", 0.8, 3.5, 79.2, AS_IT_IS),
    "evit-deit-s-0.7": Published(DEIT_S, "evit", 0.7, 3.0, 78.5, AS_IT_IS),
    "evit-deit-s-0.6": Published(DEIT_S, "evit", 0.6, 2.6, 76.8, AS_IT_IS),
    "evit-deit-b-0.9": Published(DEIT_B, "evit", 0.9, 15.3, 81.7, AS_IT_IS),
    "evit-deit-b-0.79": Published(DEIT_B, "evit", 0.79, 13.1, 81.3, AS_IT_IS),
    "evit-deit-b-0.7": Published(DEIT_B, "evit", 0.7, 11.6, 80.5, AS_IT_IS),
    "evit-lv-vit-s-0.7": Published(LV_VIT_S, "evit", 0.7, 4.7, 83.0, "Long et al., 2023, Table 2, fine-tuned"),
}
# RL4EViT, Table I: top-1 at 3.5, 3.0 and 2.6 GMACs of DeiT-S, and at 15.3, 13.1 and 11.6 of DeiT-B.
TABLE_1: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "dynamicvit": ((74.0, 67.4, 58.3), (79.9, 77.7, 75.5)),
    "tri_level": ((67.6, 67.6, 67.6), (64.6, 64.6, 64.6)),
    "evo_vit": ((79.0, 77.4, 75.0), (81.5, 80.9, 79.1)),
    "tome": ((79.4, 79.2, 78.6), (81.6, 81.2, 80.6)),
    "ats": ((79.5, 79.2, 78.6), (81.8, 81.7, 81.4)),
}
# Network, method, GMACs, top-1 and source of the other printed numbers.
OTHERS: tuple[tuple[str, str, float, float, str], ...] = (
    ("deit-s", "random", 2.6, 47.1, TABLE_2),
    ("deit-s", "random", 2.1, 35.8, TABLE_2),
    ("deit-b", "random", 11.6, 61.5, TABLE_2),
    ("deit-b", "random", 10.8, 50.4, TABLE_2),
    ("deit-s", "ltmp", 3.8, 79.8, "Bonnaerens & Dambre, 2023, one epoch"),
    ("deit-s", "ltmp", 3.0, 79.6, "Bonnaerens & Dambre, 2023, one epoch"),
    ("deit-s", "dpc", 3.0, 79.6, SCRATCH),
    ("deit-b", "dpc", 11.6, 82.0, SCRATCH),
    ("deit-s", "dpc", 2.3, 79.0, MERGERS),
    ("deit-s", "dpc_pool", 2.3, 78.1, MERGERS),
    ("deit-s", "dpc_kmeans", 2.3, 78.6, MERGERS),
    ("deit-s", "dpc_convolution", 2.3, 78.2, MERGERS),
    ("deit-s", "dpc_mlp", 2.3, 78.3, MERGERS),
    ("deit-s", "life_regression", 3.2, 79.3, LIFE_1),
    ("deit-b", "life_regression", 12.3, 80.1, LIFE_1),
    ("augreg-s", "life_regression", 3.2, 79.8, LIFE_2),
    ("augreg-s", "evo_vit", 3.0, 79.5, LIFE_2),
)
NETWORKS = {"deit-s": DEIT_S, "deit-b": DEIT_B, "augreg-s": AUGREG_S, "dinov2-s": DINOV2_S}


def _at_gmacs() -> Iterator[tuple[str, Published]]:
    """Settings named `METHOD-NETWORK-GMACS`."""
    budgets = {"deit-s": (3.5, 3.0, 2.6), "deit-b": (15.3, 13.1, 11.6)}
    rows = [
        (network, method, gmacs, top1, AS_IT_IS)
        for method, columns in TABLE_1.items()
        for (network, asked), column in zip(budgets.items(), columns, strict=True)
        for gmacs, top1 in zip(asked, column, strict=True)
    ]
    for network, method, gmacs, top1, source in (*rows, *OTHERS):
        yield f"{method}-{network}-{gmacs}", Published(NETWORKS[network], method, None, gmacs, top1, source)


def _at_half() -> Iterator[tuple[str, Published]]:
    """Settings named `METHOD-NETWORK-half`: every method at half of the dense MACs, which no paper prints."""
    for network in ("deit-s", "augreg-s", "dinov2-s"):
        is_dinov2 = network == "dinov2-s"
        options = {"img_size": 224, "pretrained": False} if is_dinov2 else {}
        for method in available():
            yield f"{method}-{network}-half", Published(NETWORKS[network], method, share=0.5, **options)


PUBLISHED: dict[str, Published] = {**AT_KEEP_RATE, **dict(_at_gmacs()), **dict(_at_half())}
