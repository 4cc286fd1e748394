"""DPC-KNN over all tokens against the golden vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import golden
from ragged import play_ragged, ragged_keep
from vitprune_env.baselines import DPCKNN
from vitprune_env.engine.backbone import Backbone
from vitprune_env.game.rollout import play
from vitprune_env.game.token_game import TokenGame


def test_golden(golden_backbone: Backbone, golden_images: Tensor) -> None:
    file, policy = golden("tr_dpcknn_equal_kr07"), DPCKNN(0.7)
    game = TokenGame.for_policy(golden_backbone, policy)
    assert [site.label for site in game.sites] == [str(block) for block in file["sites"].tolist()]
    obs = game.reset(golden_images)
    order = torch.arange(64).expand(8, 64)  # token in each place of the original's sequence
    for step in range(3):
        centres = order.gather(1, file[f"centers_local_{step}"])
        decision = policy.decide(obs)
        assert torch.equal(decision.keep, torch.zeros(8, 64, dtype=torch.bool).scatter(1, centres, True))
        assert decision.merge_into is not None
        expected = centres.gather(1, file[f"assign_local_{step}"])
        assert torch.equal(decision.merge_into.gather(1, order), expected)
        obs, order = game.step(decision)[0], centres
    torch.testing.assert_close(game.outcome().logits, file["logits"], atol=1e-4, rtol=0)


def test_tokens_are_plain_means(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DPCKNN(0.3)
    game = TokenGame(golden_backbone, [3])
    obs = game.reset(golden_images)
    game.step(policy.decide(obs))
    tokens = game.state.tokens.view(8, 19, -1)  # int(0.3 * 64) = 19
    source, before = game.state.source, obs.dense()
    for image in range(8):
        for place, token in enumerate(game.state.alive[image].nonzero()[:, 0].tolist()):
            mean = before[image, source[image] == token].mean(dim=0)
            torch.testing.assert_close(tokens[image, place], mean, atol=1e-5, rtol=1e-5)


def test_counts_refer_to_the_original_number(golden_backbone: Backbone, golden_images: Tensor) -> None:
    keep = ragged_keep(golden_backbone, 8, seed=1)
    episode = play_ragged(golden_backbone, DPCKNN(0.5), keep, golden_images)
    for step, most in ((1, 32), (2, 16)):
        before, after = episode.alive[step].sum(dim=1), episode.keep[step].sum(dim=1)
        assert torch.equal(after, before.clamp(max=most))
    assert torch.equal(episode.outcome.n_kept[:, 0], keep.sum(dim=1))


def test_one_token_is_the_least(golden_backbone: Backbone, golden_images: Tensor) -> None:
    policy = DPCKNN(0.001)
    outcome = play(TokenGame.for_policy(golden_backbone, policy), policy, golden_images).outcome
    assert (outcome.n_kept == 1).all()
    assert (outcome.source >= 0).all(), "everybody is in it"


@pytest.mark.parametrize(("name", "arguments"), [("keep_rate", (0,)), ("keep_rate", (2,)), ("neighbours", (0.5, 0))])
def test_bad_parameters_are_refused_by_name(name: str, arguments: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        DPCKNN(*arguments)
