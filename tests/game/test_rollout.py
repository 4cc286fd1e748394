from __future__ import annotations

import pytest
import torch

from helpers import Fixed, keeps_to_decisions, make_model, random_images, random_keeps, toy
from vitprune_env.baselines import EViT, RandomDrop
from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import EvidenceError
from vitprune_env.game.rewards import PaperReward
from vitprune_env.game.rollout import check_fit, evaluate, play
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import KeepAll
from vitprune_env.types import Decision, Observation


def test_an_episode_has_the_shapes_of_the_design() -> None:
    backbone, batch = toy("deit_tiny_patch16_224"), 8
    images, keeps = random_images(backbone, batch), random_keeps(3, batch, 16, seed=5)
    labels = torch.arange(batch) % 7
    game = TokenGame(backbone, reward=PaperReward())
    episode = play(game, Fixed(keeps_to_decisions(keeps)), images, labels, record=True)
    kept = torch.stack(keeps)
    outcome = episode.outcome
    assert episode.alive.shape == episode.keep.shape == episode.terminated.shape == (3, batch, 16)
    assert torch.equal(episode.keep, kept)
    assert torch.equal(episode.alive, torch.cat([torch.ones(1, batch, 16).bool(), kept[:-1]]))
    done = episode.alive & ~episode.keep
    assert torch.equal(episode.terminated[:-1], done[:-1])
    assert torch.equal(episode.terminated[-1], episode.alive[-1])
    assert (episode.terminated.sum(dim=0) == 1).all(), "every agent's game ends once"
    assert episode.reward is not None
    assert episode.reward.shape == (3, batch, 16)
    assert outcome.logits.shape == (batch, 7)
    assert outcome.n_kept.tolist() == kept.sum(dim=2).T.tolist()
    assert outcome.macs.shape == outcome.policy_macs.shape == (batch,)
    assert outcome.macs.dtype == torch.float64
    assert outcome.source.shape == outcome.size.shape == outcome.alive.shape == (batch, 16)
    assert [obs.step for obs in episode.observations] == [0, 1, 2]
    for obs, alive in zip(episode.observations, episode.alive, strict=True):
        assert torch.equal(obs.alive, alive)
    assert play(game, KeepAll(), images).observations == ()


def test_the_policy_is_reset_before_every_batch() -> None:
    class Counting(KeepAll):
        resets: list[tuple[int, int]] = []

        def reset(self, batch_size: int, num_agents: int) -> None:
            self.resets.append((batch_size, num_agents))

    backbone, policy = toy("deit_tiny_patch16_224"), Counting()
    game = TokenGame(backbone)
    play(game, policy, random_images(backbone, 2))
    play(game, policy, game.prepare(random_images(backbone, 3)))
    assert policy.resets == [(2, 16), (3, 16)]


def test_a_policy_that_lacks_something_is_refused() -> None:
    game = TokenGame(toy("deit_tiny_patch16_224"))
    images = random_images(game.backbone, 1)
    with pytest.raises(EvidenceError, match=r"EViT needs evidence \['cls_attention'\], which this game does not"):
        play(game, EViT(0.5), images)
    merging = KeepAll()
    merging.attention_bias = "log_size"
    with pytest.raises(EvidenceError, match="KeepAll wants attention_bias='log_size', this game has None"):
        play(game, merging, images)
    with pytest.raises(EvidenceError, match="KeepAll wants attention_bias=None, this game has 'log_size'"):
        check_fit(TokenGame(game.backbone, attention_bias="log_size"), KeepAll())
    check_fit(TokenGame.for_policy(game.backbone, merging), merging)


def test_for_policy_takes_wishes_and_lets_the_caller_win() -> None:
    backbone, policy = toy("golden"), EViT(0.5)
    game = TokenGame.for_policy(backbone, policy)
    assert game.needs == policy.needs
    assert TokenGame.for_policy(backbone, policy, sites=(3,), grad=True).sites == TokenGame(backbone, (3,)).sites
    assert TokenGame.for_policy(backbone, KeepAll()).sites == backbone.default_sites


def test_evaluate_by_hand() -> None:
    backbone = toy("deit_tiny_patch16_224")
    game, images = TokenGame(backbone), random_images(backbone, 7)
    with torch.no_grad():
        labels = backbone.model(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 7
    result = evaluate(game, KeepAll(), [(images[:4], labels[:4]), (game.prepare(images[4:]), labels[4:])])
    assert result.images == 7
    assert result.accuracy == pytest.approx(5 / 7)
    assert result.stderr == pytest.approx((5 / 7 * 2 / 7 / 7) ** 0.5)
    assert result.macs == game.cost.dense() == result.gmacs * 1e9
    assert result.policy_macs == 0
    assert result.keep_per_site == (1.0, 1.0, 1.0)
    pruned = evaluate(game, RandomDrop(0.5), [(images, labels)])
    assert pruned.keep_per_site == pytest.approx((8 / 16, 4 / 16, 2 / 16))
    assert pruned.macs < result.macs


def test_evaluating_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batches: expected at least one batch of labelled images, got an empty"):
        evaluate(TokenGame(toy("deit_tiny_patch16_224")), KeepAll(), [])


def test_a_batch_of_one_and_a_network_of_one_block() -> None:
    backbone = Backbone(make_model("vit_tiny_patch16_224", depth=1))
    seen: list[Observation] = []

    class Watch(KeepAll):
        def decide(self, obs: Observation) -> Decision:
            seen.append(obs)
            return super().decide(obs)

    episode = play(TokenGame(backbone), Watch(), random_images(backbone, 1))
    assert [str(obs.site) for obs in seen] == ["1"]
    assert episode.keep.shape == (1, 1, 25)
