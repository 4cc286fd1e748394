"""Apply a decision to the token state: drop, merge and park. Pure functions, differentiable in the features.

Parked tokens wait outside the computation, in rows of their own, and come back unchanged (Evo-ViT's placeholders).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from vitprune_env.engine.tokens import TokenState, arrange, drop_rows, repack, surely
from vitprune_env.errors import DecisionError
from vitprune_env.lazy_fields import given, on_demand
from vitprune_env.types import Decision


def check_decision(
    decision: Decision, alive: Tensor, parked: Tensor | None = None, embed_dim: int | None = None
) -> None:
    """Refuse a decision that does not fit the tokens in the game.

    Args:
        decision: the decision.
        alive: `[B, N]` bool, tokens among the packed rows.
        parked: `[B, N]` bool, tokens that wait; None: none do.
        embed_dim: width of the tokens; None: not looked at.

    Raises:
        DecisionError: for a wrong shape, dtype or device, a dead token that is kept, a merge target that does not
            exist, is dead, or is itself merged elsewhere, a token that should wait but does not stay, announced
            counts that are not so, or MACs that are negative or not finite.
    """
    if not isinstance(decision, Decision):
        raise DecisionError(f"decision: expected a Decision, got {type(decision).__name__}")
    _check_tensor("keep", decision.keep, alive, (torch.bool,))
    present, allowed = (alive, "obs.alive") if parked is None else (alive | parked, "(obs.alive | obs.parked)")
    if (decision.keep & ~present).any():
        image, token = (decision.keep & ~present).nonzero()[0].tolist()
        raise DecisionError(f"keep: token {token} of image {image} is dead and cannot be kept; use keep & {allowed}")
    if decision.order is not None:
        _check_tensor("order", decision.order, alive, (torch.int64, torch.int32, torch.float32, torch.float64))
        if decision.order.is_floating_point() and decision.order[present].isnan().any():
            raise DecisionError("order: expected numbers that can be sorted, got NaN")
    if decision.weight is not None:
        _check_tensor("weight", decision.weight, alive, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    if decision.merge_into is not None:
        _check_tensor("merge_into", decision.merge_into, alive, (torch.int64,))
        _check_targets(decision.merge_into, present)
    if decision.features is not None:
        _check_features(decision.features, alive, embed_dim)
    goes = survivors(decision, present)
    if decision.park is not None:
        _check_tensor("park", decision.park, alive, (torch.bool,))
        if (decision.park & ~goes).any():
            image, token = (decision.park & ~goes).nonzero()[0].tolist()
            raise DecisionError(
                f"park: token {token} of image {image} does not stay and cannot wait; use park & keep, "
                "without tokens that are merged elsewhere"
            )
        goes = goes & ~decision.park
    waits = torch.zeros_like(goes) if decision.park is None else decision.park
    most = alive.shape[1]
    for name in ("count", "park_count"):
        number = getattr(decision, name)
        if number is None:
            continue
        if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= int(number) <= most:
            raise DecisionError(f"{name}: expected None or a whole number of tokens from 0 to {most}, got {number!r}")
    if decision.count is not None and (goes.sum(dim=1) != decision.count).any():
        raise DecisionError(f"count: expected tokens that go on in every image, got {decision.count}, which is not so")
    if decision.park_count is not None and (waits.sum(dim=1) != decision.park_count).any():
        raise DecisionError(
            f"park_count: expected tokens that wait in every image, got {decision.park_count}, which is not so"
        )
    if decision.macs is not None:
        _check_macs(decision.macs, len(alive))


def _check_macs(macs: Tensor, batch: int) -> None:
    if not isinstance(macs, Tensor) or macs.shape != (batch,):
        got = tuple(macs.shape) if isinstance(macs, Tensor) else type(macs).__name__
        raise DecisionError(f"macs: expected shape [B] = ({batch},), got {got}")
    _check_strided("macs", macs)
    if macs.is_complex() or macs.dtype == torch.bool:
        raise DecisionError(f"macs: expected real numbers, got {macs.dtype}")
    if not (macs.isfinite() & (macs >= 0)).all():
        raise DecisionError(f"macs: expected what was computed, finite and not negative, got {macs.tolist()}")


def _check_tensor(name: str, value: Tensor, alive: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise DecisionError(f"{name}: expected a tensor of shape {tuple(alive.shape)}, got {type(value).__name__}")
    _check_strided(name, value)
    if value.shape != alive.shape:
        raise DecisionError(f"{name}: expected shape [B, N] = {tuple(alive.shape)}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise DecisionError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if value.device != alive.device:
        raise DecisionError(f"{name}: expected a tensor on {alive.device}, got one on {value.device}")


def _check_strided(name: str, value: Tensor) -> None:
    """Refuse sparse, nested and quantised tensors, whose layouts the engine does not read."""
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise DecisionError(
            f"{name}: expected a plain tensor (torch.strided), got one that is sparse, nested or quantised"
        )


def _check_features(features: Tensor, alive: Tensor, embed_dim: int | None) -> None:
    rows = int(alive.sum())
    wanted = f"a floating-point tensor [{rows}, {'D' if embed_dim is None else embed_dim}] on {alive.device}"
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.device != alive.device:
        got = f"{features.dtype} on {features.device}" if isinstance(features, Tensor) else type(features).__name__
        raise DecisionError(f"features: expected {wanted}, got {got}")
    _check_strided("features", features)
    if features.dim() != 2 or len(features) != rows or features.shape[1] != (embed_dim or features.shape[1]):
        raise DecisionError(f"features: expected {wanted}, one row per alive token, got {list(features.shape)}")


def _check_targets(merge_into: Tensor, alive: Tensor) -> None:
    target = merge_into.masked_fill(~alive, -1)
    if target.max() >= alive.shape[1] or target.min() < -1:
        raise DecisionError(
            f"merge_into: expected -1 to {alive.shape[1] - 1}, got {int(target.min())} to {int(target.max())}"
        )
    merged = target >= 0
    target_of_target = target.gather(1, target.clamp(min=0))
    if (merged & (target_of_target != target)).any():
        image, token = (merged & (target_of_target != target)).nonzero()[0].tolist()
        raise DecisionError(
            f"merge_into: token {token} of image {image} goes into token {int(target[image, token])}, "
            "which is dead or itself merged elsewhere; a target must point at itself"
        )


def survivors(decision: Decision, alive: Tensor) -> Tensor:
    """Tokens that stay, going on or waiting, of those in the game, `[B, N]` bool."""
    keep = decision.keep & alive
    if decision.merge_into is None:
        return keep
    itself = torch.arange(alive.shape[1], device=alive.device)
    return keep & (decision.merge_into == itself)


def rescue_empty(keep: Tensor, state: TokenState) -> Tensor:
    """Where an image would lose its last token, let its token of the largest norm stay.

    For models whose class is read from the patch tokens, so that an image without any has no logits.

    Args:
        keep: `[B, N]` bool, the tokens that would survive.
        state: the tokens before the decision.
    """
    empty = ~keep.any(dim=1)
    norms = torch.full(keep.shape, -1.0, dtype=state.x.dtype, device=keep.device)
    norms[state.image, state.token] = state.tokens.detach().norm(dim=1)
    strongest = torch.zeros_like(keep).scatter(1, norms.argmax(dim=1, keepdim=True), True)
    return keep | (strongest & empty[:, None])


def reduce_tokens(state: TokenState, decision: Decision, keep_one: bool = False) -> TokenState:
    """Drop, merge and park tokens as decided; nothing is copied when every token stays.

    Waits for the device once, to read how many tokens stay in each image (and once more if some wait). A decision that
    gives its `count` spares that.

    Args:
        state: the tokens at the site.
        decision: a checked decision.
        keep_one: whether at least one patch token must go on in every image.
    """
    if state.parked is None and decision.park is None:
        return _drop_or_merge(state, decision, keep_one)
    if _moves_no_token(state, decision):
        return state
    # All waiting tokens come back, the decision is applied to all tokens, then some wait (again).
    count, park_count = decision.count, 0 if decision.park is None else decision.park_count
    total = None if count is None or park_count is None else count + park_count
    after = _drop_or_merge(recall(state), replace(decision, count=total), keep_one)
    if decision.park is None:
        return after
    waits = decision.park & after.alive
    if keep_one and not count:
        waits, count = waits & ~rescue_empty(after.alive & ~waits, after), None
    return park(after, waits, count, park_count)


def _moves_no_token(state: TokenState, decision: Decision) -> bool:
    """Whether the same tokens go on and the same wait, as far as that shows without waiting for the device.

    The decision parks exactly the observation's own tensor, so no token began or stopped to wait; the counts show
    that none left.
    """
    aside, counts = state.parked, (decision.count, decision.park_count)
    if aside is None or decision.park is not aside.alive or None in counts:
        return False
    as_they_are = decision.merge_into is None and decision.weight is None and decision.order is None
    return as_they_are and counts == (state.count, aside.count)


def _drop_or_merge(state: TokenState, decision: Decision, keep_one: bool) -> TokenState:
    """Apply a decision to tokens none of which wait."""
    kept, count = survivors(decision, state.alive), decision.count
    chosen = kept
    if keep_one and not count:
        kept, count = rescue_empty(chosen, state), None  # also where the policy said 0
    rank = state.rank if decision.order is None else decision.order
    groups, layout = _arrangement(state, count, kept)
    if decision.merge_into is None and decision.weight is None and decision.features is None:
        if surely(_total(groups) == _total(state.groups)):  # no token left
            return state if rank is state.rank else replace(state, rank=rank)
        return _drop(
            state,
            TokenState(
                x=state.x,
                alive=kept,
                size=on_demand(_left_size, given(state, "size"), kept),
                source=on_demand(_left_source, given(state, "source"), kept),
                groups=groups,
                num_prefix=state.num_prefix,
                half=state.half,
                rank=rank,
                layout=layout,
                images=state.images,
            ),
        )
    new = replace(state, alive=kept, groups=groups, layout=layout, rank=rank)
    target = _targets(decision, state.alive, chosen, kept)
    # A rescued token stays as it is: alone, its weight 1.
    weight = None if decision.weight is None else decision.weight.masked_fill(kept & ~chosen, 1)
    values = state.tokens if decision.features is None else decision.features.to(state.x)
    merged, size = _merge(values, state, target, new, weight)
    source = torch.where(state.source >= 0, target.gather(1, state.source.clamp(min=0)), -1)
    rows = state.x.shape[0] + torch.arange(merged.shape[0], device=merged.device)
    return repack(state, replace(new, size=size, source=source), torch.cat([state.x, merged]), rows)


def _drop(state: TokenState, new: TokenState) -> TokenState:
    """The rows of `state` that `new` still has."""
    # ONNX does not know `nonzero_static`, by which rows stay where they are.
    if state.layout is None and new.layout is None and not torch.compiler.is_compiling():
        return drop_rows(state, new)
    return repack(state, new, state.x, state.row_of[new.image, new.token])


def _left_size(size: Tensor | Callable[[], Tensor], kept: Tensor) -> Tensor:
    """Sizes before a drop to those after it, `[B, N]`; computed only when they are read."""
    return (size if isinstance(size, Tensor) else size()) * kept


def _left_source(source: Tensor | Callable[[], Tensor], kept: Tensor) -> Tensor:
    """The same for the sources."""
    source = source if isinstance(source, Tensor) else source()
    return torch.where(_gather(kept, source), source, -1)


def _gather(flags: Tensor, source: Tensor) -> Tensor:
    """`flags[b, source[b, j]]`, false where source is -1."""
    return flags.gather(1, source.clamp(min=0)) & (source >= 0)


def _targets(decision: Decision, alive: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    """Where each token goes, `[B, N]`: a chosen token, itself where it stays without being chosen, or -1."""
    itself = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    target = itself if decision.merge_into is None else decision.merge_into
    target = torch.where(chosen, itself, target).masked_fill(~alive, -1)
    return torch.where(kept, itself, torch.where(_gather(chosen, target), target, -1))


def _merge(
    values: Tensor, state: TokenState, target: Tensor, new: TokenState, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the groups of `values` `[sum n_i, D]`: features `[sum n'_i, D]` and sizes `[B, N]`."""
    kept, total = new.alive, new.image.shape[0]
    new_row = (kept.flatten().cumsum(0) - 1).view(kept.shape)
    to = target[state.image, state.token]
    # Tokens that leave add up in one extra row: leaving them out would need their number, and so wait for the device.
    destination = torch.where(to >= 0, new_row[state.image, to.clamp(min=0)], total)
    if weight is not None:
        values = values * weight[state.image, state.token].to(values)[:, None]
    x = values.new_zeros(total + 1, values.shape[1]).index_add(0, destination, values)[:total]
    joins = (target >= 0) & state.alive
    size = torch.zeros_like(state.size).scatter_add(1, target.clamp(min=0), state.size * joins)
    return x, size


def _arrangement(
    state: TokenState, count: int | None, kept: Tensor
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None]:
    """Groups and layout of the tokens that stay."""
    if count is not None:
        return ((state.batch_size, state.num_prefix + count),), None
    lengths = [state.num_prefix + count for count in kept.sum(dim=1).tolist()]
    # Other devices have attention that takes ragged rows as they lie.
    return arrange(lengths, sort=kept.device.type == "cpu")


def _total(groups: tuple[tuple[int, int], ...]) -> int:
    """All rows of all images; a Python number, also under tracing."""
    return sum(images * rows for images, rows in groups)


def park(state: TokenState, waits: Tensor, count: int | None = None, park_count: int | None = None) -> TokenState:
    """Take tokens out of the rows and let them wait.

    Waits for the device once, to read the numbers of tokens; not at all if both counts are given.

    Args:
        state: tokens none of which wait yet.
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
