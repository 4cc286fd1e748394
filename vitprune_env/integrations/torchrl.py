"""The batched game as a TorchRL environment."""

# pyright: reportMissingImports=false
# TorchRL is an optional extra.

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.errors import MissingPackageError

try:
    import torch
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError as error:
    raise MissingPackageError(f"TokenEnv: expected TorchRL, got {error}; pip install vitprune_env[torchrl]") from error

GROUP = "tokens"
ACTION_MASK = "action_mask"
STATE = "state"


class TokenEnv(EnvBase):
    """B games at once, one image each. The N patch tokens of an image are the agents of the group `tokens`.

    It is the game of the `TokenVectorEnv` that it is given, step for step.

    | key | shape | |
    |---|---|---|
    | `("tokens", "observation")` | `[B, N, D]` | features; zeros for pruned tokens, and for all once the game is over |
    | `("tokens", "mask")` | `[B, N]` bool | tokens still in the game |
    | `("tokens", "action_mask")` | `[B, N, A]` bool | actions that make sense: all, or those of the action kind's \
      mask; for a pruned token only 0, so that it has no part in the gradient of a masked policy |
    | `"state"` | `[B, (P + N) * (D + 1)]` | features and alive flags of all tokens; only where it is asked for |
    | `("tokens", "action")` | `[B, N]` int64 | 0 to A - 1, as the action kind defines them; ignored for pruned tokens |
    | `("tokens", "reward")` | `[B, N, 1]` | |
    | `"done"`, `"terminated"` | `[B, 1]` bool | true for all games after T steps |
    | `("tokens", "done")`, `("tokens", "terminated")` | `[B, N, 1]` bool | the same for every agent |
    | `("outcome", "correct")` | `[B, 1]` bool | at the end of the game; False before |
    | `("outcome", "macs")` | `[B, 1]` float64 | at the end of the game; 0 before |
    | `("outcome", "n_kept")` | `[B, T]` int64 | at the end of the game; 0 before |

    All games begin and end together, so a reset begins all of them anew. `set_seed` restarts the stream of images at
    the next reset; no global random state is used. `reset(options={"indices": [B]})` plays these items of a dataset.

    Example:
        >>> venv = TokenVectorEnv(TokenGame(load_backbone()), Digits("train", size=512), num_envs=16)
        >>> env = TokenEnv(venv)
        >>> _ = env.set_seed(0)
        >>> games = env.rollout(venv.num_steps)
        >>> correct = games["next", "outcome", "correct"]
        >>> accuracy = correct[:, -1].float().mean()

    Args:
        venv: the games to play. Do not step it elsewhere at the same time. Everything is on the device of its backbone.
        state: whether each step also gives the state, for critics that read it.

    Attributes:
        venv: the same.
        group_map: `{"tokens": [...]}` with the names that `parallel_env` gives to the agents.
    """

    def __init__(self, venv: TokenVectorEnv, state: bool = False) -> None:
        game = venv.game
        super().__init__(device=next(game.backbone.parameters()).device, batch_size=(venv.num_envs,))
        self.venv = venv
        self.group_map = {GROUP: [f"token_{index}" for index in range(game.num_agents)]}
        self._with_state = state
        self._seed: int | None = None  # of the next reset; None: go on
        self._make_specs()

    def _make_specs(self) -> None:
        game, images = self.venv.game, self.batch_size
        agents = (*images, game.num_agents)
        count = self.venv.actions.count(game.num_agents)
        features = Unbounded((*agents, game.backbone.embed_dim))
        masks = {"mask": _flags(*agents), ACTION_MASK: _flags(*agents, count)}
        tokens = Composite({"observation": features, **masks}, shape=agents)
        outcome = Composite(
            correct=_flags(*images, 1),
            macs=Unbounded((*images, 1), dtype=torch.float64),
            n_kept=Unbounded((*images, game.num_steps), dtype=torch.int64),
            shape=images,
        )
        observation = Composite({GROUP: tokens, "outcome": outcome}, shape=images)
        if self._with_state:
            rows = game.backbone.num_prefix + game.num_agents
            observation[STATE] = Unbounded((*images, rows * (game.backbone.embed_dim + 1)))
        done = Composite(done=_flags(*images, 1), terminated=_flags(*images, 1), shape=images)
        done[GROUP] = Composite(done=_flags(*agents, 1), terminated=_flags(*agents, 1), shape=agents)
        action = Composite(action=Categorical(count, shape=agents, dtype=torch.int64), shape=agents)
        reward = Composite(reward=Unbounded((*agents, 1)), shape=agents)
        self.observation_spec = observation.to(self.device)
        self.action_spec = Composite({GROUP: action}, shape=images).to(self.device)
        self.reward_spec = Composite({GROUP: reward}, shape=images).to(self.device)
        self.done_spec = done.to(self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, options: dict[str, Any] | None = None) -> TensorDictBase:
        """Begin games with the next images.

        Raises:
            ValueError: if only some of the games are to begin anew.
        """
        asked = None if tensordict is None else tensordict.get("_reset", None)
        if asked is not None and not asked.all():
            raise ValueError(f"_reset: expected all {asked.numel()} games, which end together, got {int(asked.sum())}")
        seed, self._seed = self._seed, None
        features, infos = self.venv.reset(seed=seed, options=options)
        return self._seen(features, infos).update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        features, reward, over, _, infos = self.venv.step(tensordict[GROUP, "action"])
        found = self._seen(features, infos)
        found[GROUP, "reward"] = reward[..., None]
        for name in ("done", "terminated"):
            found[name] = over.all(dim=1, keepdim=True)
            found[GROUP, name] = over[..., None].clone()
        return found

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed

    def _seen(self, features: Tensor, infos: dict[str, Any]) -> TensorDict:
        """What a reset or step shows beside reward and end."""
        alive = infos["alive"].clone()
        action = self.full_action_spec[GROUP, "action"]
        allowed = infos.get(ACTION_MASK)
        if allowed is None:
            allowed = alive[..., None] | (torch.arange(action.n, device=alive.device) == 0)
        action.update_mask(allowed)  # random actions obey it
        tokens = {"observation": features, "mask": alive, ACTION_MASK: allowed}
        outcome = self.full_observation_spec["outcome"].zero()
        if "correct" in infos:
            outcome.update({"correct": infos["correct"][:, None], "macs": infos["macs"][:, None]})
            outcome["n_kept"] = infos["n_kept"]
        seen = {GROUP: TensorDict(tokens, alive.shape), "outcome": outcome}
        if self._with_state:
            seen[STATE] = self.venv.state()
        return TensorDict(seen, self.batch_size, device=self.device)


def _flags(*shape: int) -> Categorical:
    """The spec of a bool tensor."""
    return Categorical(2, shape=shape, dtype=torch.bool)
