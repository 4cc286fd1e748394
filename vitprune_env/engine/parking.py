"""Tokens that wait outside the computation and come back unchanged (Evo-ViT's placeholders). Pure functions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitprune_env.engine.tokens import TokenState, arrange, repack


def park(state: TokenState, waits: Tensor, count: int | None = None, park_count: int | None = None) -> TokenState:
    """Take tokens out of the rows and let them wait.

    Asks the device once for the numbers of tokens, and not at all if both counts are given.

    Args:
        state: tokens of which nobody waits yet.
        waits: `[B, N]` bool, alive tokens that wait from now on.
        count: how many go on in every image, where known.
        park_count: how many wait in every image, where known.
    """
    goes = state.alive & ~waits
    if count is None or park_count is None:
        going, waiting = torch.stack([goes.sum(dim=1), waits.sum(dim=1)]).tolist()
        groups, layout = arrange([state.num_prefix + n for n in going], sort=waits.device.type == "cpu")
        waiting_groups, _ = arrange(waiting, sort=False)
    else:
        groups, layout = ((state.batch_size, state.num_prefix + count),), None
        waiting_groups = ((state.batch_size, park_count),)
    if not any(rows for _, rows in waiting_groups):
        return state
    aside = replace(state, alive=waits, groups=waiting_groups, layout=None, num_prefix=0)
    aside = aside.with_rows(state.x.index_select(0, state.row_of[aside.image, aside.token]))
    rest = replace(state, alive=goes, groups=groups, layout=layout, parked=aside)
    return repack(state, rest, state.x, state.row_of[rest.image, rest.token])


def recall(state: TokenState) -> TokenState:
    """Let all waiting tokens come back, behind the others of the sequence."""
    aside = state.parked
    if aside is None:
        return state
    if state.is_uniform and aside.is_uniform:
        groups, layout = ((state.batch_size, state.groups[0][1] + aside.groups[0][1]),), None
    else:
        lengths = [rows + more for rows, more in zip(state.lengths, aside.lengths, strict=True)]
        groups, layout = arrange(lengths, sort=state.alive.device.type == "cpu")
    behind = state.alive.shape[1] + aside.order
    new = replace(
        state,
        alive=state.alive | aside.alive,
        groups=groups,
        layout=layout,
        rank=torch.where(aside.alive, behind, state.order),
        parked=None,
    )
    row = torch.where(aside.alive, state.x.shape[0] + aside.row_of, state.row_of)
    return repack(state, new, torch.cat([state.x, aside.x]), row[new.image, new.token])
