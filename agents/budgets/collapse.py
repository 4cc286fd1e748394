"""Detection of runs in which the agents prune everything or nothing, and cannot learn any more."""

from __future__ import annotations

import warnings


class CollapseWarning(UserWarning):
    """Play has settled where nothing can be learnt: every token pruned, or every token kept."""


class CollapseDetector:
    """Warns once when play has been at an extreme for several updates.

    Args:
        patience: updates in a row.
    """

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.streak = 0

    def observe(self, first: float, last: float, target_fraction: float, accuracy: float) -> bool:
        """Look at an update.

        Args:
            first: share of the tokens left after the first site.
            last: share of the tokens left after the last site.
            target_fraction: what the target would leave if all pruning happened at the first site.
            accuracy: of the games played.

        Returns:
            Whether play is collapsed.
        """
        empty = first < 0.1 * target_fraction
        full = last > 0.99 and target_fraction < 0.9
        self.streak = self.streak + 1 if empty or full else 0
        if self.streak == self.patience:
            what = "pruned nearly every token" if empty else "kept every token"
            remedy = "lower keep_cost or price, or anneal the target more slowly" if empty else "raise the price"
            warnings.warn(
                f"training collapsed: the agents have {what} for {self.patience} updates (accuracy {accuracy:.1%}, "
                f"{first:.1%} of the tokens left after the first site, target about {target_fraction:.1%}); {remedy}",
                CollapseWarning,
                stacklevel=2,
            )
        return self.streak >= self.patience
