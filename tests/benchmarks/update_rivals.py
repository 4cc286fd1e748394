"""The same update by others: tianshou's stock PPO and TorchRL's `ClipPPOLoss`, on the same live agent-steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Discrete
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import ReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step
from torch import Tensor, nn

from dense_ppo import JoinedCritic, Settings
from vitprune_env.agents.learners.buffer import Trajectory
from vitprune_env.agents.networks import TokenActor, TokenCritic

Update = Callable[[], object]


class TokenHalf(nn.Module):
    """An actor that reads the token's half of a joint observation."""

    def __init__(self, actor: TokenActor) -> None:
        super().__init__()
        self.actor = copy.deepcopy(actor)

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """As tianshou calls actors."""
        return self.actor(obs[:, : self.actor.embed_dim]), state


class Column(nn.Module):
    """A critic that answers `[rows, 1]`."""

    def __init__(self, critic: TokenCritic) -> None:
        super().__init__()
        self.joined = JoinedCritic(critic)

    def forward(self, obs: Tensor) -> Tensor:
        """`[rows, 2 D]` to `[rows, 1]`."""
        return self.joined(obs)[:, None]


def joint_rows(rows: Trajectory) -> Tensor:
    """Token and class token of every live agent-step side by side, `[M, 2 D]`."""
    return torch.cat([rows.tokens, rows.cls[rows.image]], dim=1)


def stock_ppo(
    rows: Trajectory, actor: TokenActor, critic: TokenCritic, lr: float, settings: Settings, epochs: int
) -> Update:
    """tianshou's PPO; its buffer is filled beforehand."""
    obs = joint_rows(rows)
    done = rows.flat(rows.terminated).numpy()
    following = np.minimum(np.arange(len(rows)) + 1, len(rows) - 1)
    columns: dict[str, Any] = {
        "obs": obs,
        "act": rows.action,
        "rew": rows.flat(rows.reward).double().numpy(),
        "terminated": done,
        "truncated": np.zeros_like(done),
        "done": done,
        "obs_next": obs[torch.from_numpy(np.where(done, np.arange(len(rows)), following))],
    }
    buffer = ReplayBuffer.from_data(**columns)
    algorithm = PPO(
        policy=DiscreteActorPolicy(actor=cast(Any, TokenHalf(actor)), action_space=Discrete(2)),
        critic=Column(critic),
        optim=AdamOptimizerFactory(lr=lr, eps=1e-5),
        eps_clip=settings.clip,
        value_clip=True,
        max_batchsize=len(rows),
        **{name: getattr(settings, name) for name in ("vf_coef", "ent_coef", "max_grad_norm", "gamma", "gae_lambda")},
    )

    def update() -> object:
        with policy_within_training_step(algorithm.policy):
            return algorithm.update(buffer, None, epochs)

    return update


def torchrl_ppo(
    rows: Trajectory, actor: TokenActor, critic: TokenCritic, lr: float, settings: Settings, epochs: int
) -> Update:
    """TorchRL's loss and advantage estimate, with an optimiser around them.

    Raises:
        ImportError: without torchrl.
    """
    from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
    from tensordict.nn import TensorDictModule  # pyright: ignore[reportMissingImports]
    from torchrl.modules import ProbabilisticActor, ValueOperator  # pyright: ignore[reportMissingImports]
    from torchrl.objectives import ClipPPOLoss  # pyright: ignore[reportMissingImports]
    from torchrl.objectives.value.functional import generalized_advantage_estimate  # pyright: ignore[reportMissingImports]

    obs, half, column = joint_rows(rows), TokenHalf(actor), Column(critic)
    policy = ProbabilisticActor(
        TensorDictModule(lambda seen: half(seen)[0], in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    policy.half = half  # so that the loss finds the parameters
    loss = ClipPPOLoss(
        policy,
        ValueOperator(column, in_keys=["observation"]),
        clip_epsilon=settings.clip,
        entropy_coeff=settings.ent_coef,
        critic_coeff=settings.vf_coef,
        loss_critic_type="l2",
        clip_value=settings.value_clip,
        normalize_advantage=True,
        functional=False,
    )
    parameters = list(loss.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=1e-5)

    def by_agent(table: Tensor) -> Tensor:
        return table.permute(1, 2, 0).flatten(0, 1)[..., None]

    def update() -> None:
        with torch.no_grad():
            value = column(obs).squeeze(1)
            table = rows.dense(value)
            after = torch.cat([table[1:], torch.zeros_like(table[:1])])
            ends = by_agent(rows.terminated | ~rows.alive)
            advantage, target = generalized_advantage_estimate(
                settings.gamma, settings.gae_lambda, by_agent(table), by_agent(after), by_agent(rows.reward), ends
            )
        live = by_agent(rows.alive).squeeze(-1)
        batch = TensorDict(
            {
                "observation": obs,
                "action": rows.action,
                loss.tensor_keys.sample_log_prob: rows.log_prob,
                "advantage": advantage[live],
                "value_target": target[live],
                "state_value": value[:, None],
            },
            batch_size=[len(rows)],
        )
        for _ in range(epochs):
            parts = loss(batch)
            optimizer.zero_grad()
            torch.stack([part for name, part in parts.items() if name.startswith("loss_")]).sum().backward()
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()

    return update
