"""Oracles of bipartite matching: hand-made observations, a plain Python matching, and the authors' results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers import golden
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import Observation, Outcome, Site


def observe(
    alive: torch.Tensor, keys: torch.Tensor, order: torch.Tensor | None = None, num_prefix: int = 1, **changes: Any
) -> Observation:
    """What a policy sees of tokens with the dense keys `[B, N, d]`."""
    image, token = alive.nonzero(as_tuple=True)
    counts = alive.sum(dim=1)
    ranks = alive.cumsum(dim=1) - 1 if order is None else order
    same = int(counts[0]) if bool((counts == counts[0]).all()) else None
    return Observation(
        tokens=torch.zeros(len(image), 2), image=image, token=token,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]), cls=torch.zeros(len(alive), 2), alive=alive,
        size=alive.float(), order=ranks.masked_fill(~alive, -1), position=torch.zeros(alive.shape[1], 2),
        site=Site.parse("1.attn"), step=0, num_steps=1, depth=1, evidence={"keys": keys[image, token]},
        count=same, num_prefix=num_prefix, **changes,
    )  # fmt: skip


def random_observation(seed: int, batch: int, tokens: int, num_prefix: int, ragged: bool = True) -> Observation:
    """Random keys, in a random order, of images with very different numbers of tokens, some with one or none."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0, 1, batch)[:, None] if ragged else torch.ones(batch, 1)
    alive = torch.rand(batch, tokens, generator=generator) < share
    shuffled = torch.rand(batch, tokens, generator=generator).masked_fill(~alive, 2.0)
    order = shuffled.argsort(dim=1).argsort(dim=1)
    return observe(alive, torch.randn(batch, tokens, 5, generator=generator), order, num_prefix)


def naive_match(obs: Observation, image: int) -> dict[int, tuple[int, float]]:
    """Sender -> (receiver, similarity), the sequence spelled out."""
    keys = obs.scatter(obs.evidence["keys"])[image]
    keys = keys / keys.norm(dim=1, keepdim=True)
    alive = obs.alive[image].nonzero()[:, 0].tolist()
    sequence = [None] * obs.num_prefix + sorted(alive, key=lambda token: int(obs.order[image, token]))
    senders, receivers = ([token for token in sequence[start::2] if token is not None] for start in (0, 1))
    found = {}
    for sender in senders if receivers else []:
        similarity = [float(keys[sender] @ keys[receiver]) for receiver in receivers]
        best = max(range(len(receivers)), key=similarity.__getitem__)
        found[sender] = receivers[best], similarity[best]
    return found


def groups_after_each_step(backbone: Backbone, policy: Policy, images: Tensor) -> tuple[Tensor, Outcome]:
    """Place in the sequence, class token at 0, that every patch has got to; -1 = pruned. `[T, B, N]`."""
    game, places = TokenGame.for_policy(backbone, policy), []
    obs: Observation | None = game.reset(images)
    while obs is not None:
        obs, *_ = game.step(policy.decide(obs))
        state = game.state
        place = state.order.gather(1, state.source.clamp(min=0)) + 1
        places.append(place.masked_fill(state.source < 0, -1))
    return torch.stack(places), game.outcome()


def check_against_the_original(name: str, policy: Policy, backbone: Backbone, images: Tensor) -> None:
    """Same groups, same order of the tokens, same sizes, same logits."""
    file = golden(name)
    places, outcome = groups_after_each_step(backbone, policy, images)
    assert torch.equal(places, file["group_of_input_token"][:, :, 1:])
    torch.testing.assert_close(outcome.logits, file["logits"], atol=1e-4, rtol=0)
    counts = file["token_counts_after_block"].view(12, -1).expand(12, len(images))
    assert torch.equal(outcome.n_kept.T + 1, counts), "the class token is counted there"
    if "size" in file:
        place = places[-1].clamp(min=0)
        assert torch.equal(
            outcome.size.gather(1, outcome.source.clamp(min=0)) * (outcome.source >= 0),
            file["size"][-1].gather(1, place) * (places[-1] >= 0),
        )
