"""The fast update is the plain one: folded norms, packed rows, chunks, shared class-token part; bf16 comes close."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.utils.torch_utils import policy_within_training_step
from torch import Tensor, nn

from dense_ppo import DenseGames, DensePPO, Settings, masked_play
from games import OwnLabels, Teacher, explored, toy_game
from places import TESTS
from vitprune_env.agents.learners.buffer import GameBuffer, Trajectory
from vitprune_env.agents.learners.exploration import ExploringPolicy
from vitprune_env.agents.learners.gradient import chunk_rows
from vitprune_env.agents.learners.mappo import MAPPO, MAPPOStats
from vitprune_env.agents.networks import TokenActor, TokenCritic, standardize
from vitprune_env.agents.policies import TokenPolicy
from vitprune_env.game.rollout import play

DIM = 48
SETTINGS = Settings()


def networks(keep_bias: float = -0.3) -> tuple[TokenActor, TokenCritic]:
    """Norms that have learnt something; an actor whose decisions vary, and lose about half of the agent-steps."""
    actor, critic = TokenActor(DIM, (16,), keep_bias), TokenCritic(DIM, (32, 16))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        actor.layers[-1].weight.mul_(30)  # pyright: ignore
        for norm in (actor.norm, critic.norm_token, critic.norm_image):
            norm.weight.add_(0.3 * torch.randn(DIM, generator=generator))
            norm.bias.add_(0.3 * torch.randn(DIM, generator=generator))
    return actor, critic


def moved(rows: Trajectory) -> Trajectory:
    """As if the policy had changed since it played: ratios lie on both sides of the clipping range."""
    noise = 0.3 * torch.randn(len(rows), generator=torch.Generator().manual_seed(5))
    return Trajectory(**{**vars(rows), "log_prob": rows.log_prob + noise})


ROWS = moved(explored(toy_game(), networks()[0], seed=0)[1])


def updated(rows: Trajectory, batch_size: int | None = None, repeat: int = 1, **options: Any) -> tuple[MAPPO, Any]:
    actor, critic = networks()
    mappo = MAPPO(actor=actor, critic=critic, optim=AdamOptimizerFactory(lr=1e-3, eps=1e-5), **options)
    buffer = GameBuffer()
    buffer.store(rows)
    with policy_within_training_step(mappo.policy):
        return mappo, mappo.update(buffer, batch_size, repeat)


def gradients(mappo: MAPPO) -> Tensor:
    """What the last gradient step left in the parameters, after clipping."""
    modules = (mappo.actor, mappo.token_critic)
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters() if p.grad is not None])


def parameters(mappo: MAPPO) -> Tensor:
    return torch.cat([p.detach().flatten() for module in (mappo.actor, mappo.critic) for p in module.parameters()])


@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize("epochs", [1, 3])
def test_gradients_equal_those_of_the_dense_update(epochs: int, chunk: int | None) -> None:
    actor, critic = networks()
    game, data = toy_game(), OwnLabels(6)
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0))
    episode = play(game, explorer, data.images, data.labels, record=True)
    assert 0.3 < episode.alive.float().mean() < 0.8
    dense = DensePPO(actor, critic, 1e-3, SETTINGS)
    dense.update(DenseGames.of(episode, explorer.log_probs), epochs)
    rows = Trajectory.of(episode, explorer.actions, explorer.log_probs)
    mappo, _ = updated(rows, None, epochs, update_chunk=chunk, **SETTINGS.for_mappo())
    theirs = [*(p.grad for p in dense.actor.parameters()), *dense.critic.gradients_like(critic)]
    expected = torch.cat([gradient.flatten() for gradient in theirs if gradient is not None])
    assert expected.norm() > 0.1
    assert torch.allclose(gradients(mappo), expected, atol=1e-5, rtol=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "raw_advantages": {"advantage_normalization": False},
    "entropy": {"ent_coef": 0.1, "vf_coef": 1.0},
    "dual_clip": {"dual_clip": 1.2},
    "huber": {"huber_delta": 0.1, "value_clip": None},
    "value_norm": {"value_norm": True},
    "recompute": {"recompute_advantage": True},
    "unbounded": {"max_grad_norm": None},
}


@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_nothing(variant: str, batch_size: int | None) -> None:
    whole, expected = updated(ROWS, batch_size, 2, update_chunk=10**6, **VARIANTS[variant])
    parts, stats = updated(ROWS, batch_size, 2, update_chunk=19, **VARIANTS[variant])
    assert torch.allclose(gradients(parts), gradients(whole), atol=1e-5, rtol=1e-5)
    assert torch.allclose(parameters(parts), parameters(whole), atol=1e-5, rtol=0)
    assert stats.gradient_steps == expected.gradient_steps
    for name in ("approx_kl", "clip_frac", "explained_variance", "grad_norm"):
        assert getattr(stats, name) == pytest.approx(getattr(expected, name), abs=1e-4)
    for name in ("loss", "actor_loss", "vf_loss", "ent_loss"):
        assert getattr(stats, name).mean == pytest.approx(getattr(expected, name).mean, abs=1e-5)


WHOLE = gradients(updated(ROWS, update_chunk=10**6)[0])


@given(chunk=st.integers(1, len(ROWS) + 5))
def test_any_chunk_will_do(chunk: int) -> None:
    assert torch.allclose(gradients(updated(ROWS, update_chunk=chunk)[0]), WHOLE, atol=1e-5, rtol=0)


def test_small_chunks_hold_little_for_the_backward_pass() -> None:
    def held(chunk: int) -> int:
        now = peak = 0

        class Hold:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal now, peak
                self.tensor = tensor
                now += tensor.nbytes
                peak = max(peak, now)

            def __del__(self) -> None:
                nonlocal now
                now -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Hold, lambda hold: hold.tensor):
            updated(ROWS, update_chunk=chunk)
        return peak

    assert held(len(ROWS) // 8) < held(len(ROWS)) / 3


def test_class_token_part_is_computed_once_per_image_and_minibatch() -> None:
    actor, critic = networks()
    seen: list[int] = []
    critic.image.register_forward_hook(lambda *call: seen.append(len(call[-1])))
    buffer = GameBuffer()
    buffer.store(ROWS)
    mappo = MAPPO(actor=actor, critic=critic, update_chunk=20)
    with policy_within_training_step(mappo.policy):
        steps = cast(MAPPOStats, mappo.update(buffer, 64, 2)).gradient_steps
    assert seen == [len(ROWS.cls)] * (1 + steps)  # the values before, then each minibatch


def test_folded_networks_are_the_networks() -> None:
    actor, critic = networks()
    twins = copy.deepcopy((actor, critic))
    tokens, cls, image = 5 + 3 * ROWS.tokens[:30], ROWS.cls, ROWS.image[:30]
    plain = (actor.keep_logit(tokens), critic(tokens, cls, image))
    seen = standardize(tokens)
    folded = (
        twins[0].keep_logit_folded(seen, *twins[0].folded()),
        twins[1].value_folded(seen, image, *twins[1].folded(cls)),
    )
    for net, twin, one, two in zip((actor, critic), twins, plain, folded, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
        one.square().sum().backward()
        two.square().sum().backward()
        for (name, parameter), other in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert parameter.grad is not None, name
            assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-4), name  # pyright: ignore


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_norm_is_that_before_clipping(limit: float | None) -> None:
    mappo, stats = updated(ROWS, max_grad_norm=limit)
    assert isinstance(stats, MAPPOStats)
    assert stats.grad_norm == pytest.approx(WHOLE_NORM, rel=1e-4)
    assert gradients(mappo).norm().item() == pytest.approx(limit or WHOLE_NORM, rel=1e-3)


WHOLE_NORM = gradients(updated(ROWS, max_grad_norm=None)[0]).norm().item()


def test_bf16_gradients_point_where_those_in_fp32_do() -> None:
    options = {"max_grad_norm": None}
    exact, half = (updated(ROWS, precision=name, **options)[0] for name in ("fp32", "bf16"))
    one, two = gradients(exact), gradients(half)
    assert two.dtype == torch.float32
    assert not torch.equal(one, two)
    assert torch.cosine_similarity(one, two, dim=0) > 0.99
    assert (two - one).norm() < 0.15 * one.norm()
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_bf16_learns_what_the_teacher_wants() -> None:
    game, data = toy_game(), OwnLabels(12)
    quiet = 0.1 * data.images  # tokens are then told apart by their position
    left = torch.arange(25) % 5 < 2
    game.reward = Teacher(left)  # pyright: ignore[reportAttributeAccessIssue]
    actor, critic = TokenActor(DIM, (32,)), TokenCritic(DIM, (32,))
    mappo = MAPPO(actor=actor, critic=critic, optim=AdamOptimizerFactory(lr=5e-3), precision="bf16", update_chunk=100)
    buffer = GameBuffer()
    for seed in range(16):
        explorer = ExploringPolicy(actor, torch.Generator().manual_seed(seed))
        episode = play(game, explorer, quiet, data.labels, record=True)
        buffer.store(Trajectory.of(episode, explorer.actions, explorer.log_probs))
        with policy_within_training_step(mappo.policy):
            mappo.update(buffer, 128, 3)
    keep = play(game, TokenPolicy(actor), quiet).keep
    assert keep[-1][:, left].float().mean() > 0.9
    assert keep[0][:, ~left].float().mean() < 0.1


def test_chunk_sizes_by_hand() -> None:
    assert chunk_rows((1000, 24), "cpu") == 8192  # 32 MiB / 4096 bytes
    assert chunk_rows((1000, 24), "cuda") == 262144
    assert chunk_rows((10**6,), "cpu") == 256


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="update_chunk: expected at least 1"):
        updated(ROWS, update_chunk=0)
    with pytest.raises(ValueError, match=r"precision: expected one of fp32, bf16, got 'fp8'"):
        updated(ROWS, precision="fp8")


@pytest.mark.slow
def test_benchmark_runs() -> None:
    script = TESTS / "benchmarks" / "update.py"
    options = ["--models", "vit_digits", "--sizes", "light", "--images", "2", "--pairs", "1", "--cycle-epochs", "1"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    for name in ("dense, full batch", "MAPPO, bf16", "tianshou PPO", "same, first blocks cached"):
        assert name in done.stdout


def test_masked_play_is_packed_play() -> None:
    """The dense cycle that the benchmark compares with plays the same game."""
    actor, _ = networks()
    with torch.no_grad():
        last: nn.Linear = actor.layers[-1]  # pyright: ignore
        last.weight.mul_(1e6)  # chance has no say
    game, data = toy_game(), OwnLabels(4)
    explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0))
    episode = play(game, explorer, data.images, data.labels, record=True)
    packed = DenseGames.of(episode, explorer.log_probs)
    masked = masked_play(game, actor, data.images, data.labels, torch.Generator().manual_seed(1))
    assert 0.1 < packed.keep.float().mean() < 0.9
    for name in ("keep", "alive", "terminated"):
        assert torch.equal(getattr(masked, name), getattr(packed, name))
    assert torch.allclose(masked.reward, packed.reward, atol=1e-4)
    assert torch.allclose(masked.cls, packed.cls, atol=1e-4)
    assert torch.allclose(masked.tokens * masked.alive[..., None], packed.tokens, atol=1e-4)
