"""The errors users meet; every one is a `ValueError` that names the argument, what was expected and what came."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 12  # that a message lists


class VitPruneError(ValueError):
    """Base class: a mistake in the arguments, explained in one sentence."""


class UnsupportedBackboneError(VitPruneError):
    """The engine cannot run this model; the message names the part that is not supported."""


class SiteError(VitPruneError):
    """Pruning sites outside the network, repeated or out of order."""


class DecisionError(VitPruneError):
    """A decision that the game cannot apply: wrong shape, dtype or device, or a token that is not in the game."""


class EvidenceError(VitPruneError):
    """A policy asks for evidence that this game does not compute or this backbone does not have."""


class BudgetError(VitPruneError):
    """A budget outside what the network can cost."""


class SettingsError(VitPruneError):
    """Settings that do not fit together, or not what they are used on."""


class NumericalError(VitPruneError):
    """NaN or infinity where a number was due (logits, loss)."""


class ParameterError(VitPruneError):
    """A parameter that a method does not have, or one that it cannot do without."""


class CheckpointError(VitPruneError):
    """An unreadable or foreign checkpoint."""


class StorageError(VitPruneError, OSError):
    """A file or folder that cannot be written: no space left, no permission, not a folder."""


class MissingPackageError(VitPruneError, ImportError):
    """A package is missing that an option needs."""


class UnreadableImageError(VitPruneError):
    """An image file that cannot be decoded; the message begins with its name."""


class ExportError(VitPruneError):
    """A model that cannot become one graph of fixed shapes."""


class UnknownNameError(VitPruneError):
    """A name that is not registered; the message gives the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        listed = ", ".join([*known[:MOST_NAMES], *["..."] * (len(known) > MOST_NAMES)])
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {listed}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")
