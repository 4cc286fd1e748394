"""The Gymnasium vector environment: one agent per image, B images in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import nn

from vitprune_env.data import ImageDataset
from vitprune_env.engine.backbone import Backbone
from vitprune_env.envs.action_game import check_seed
from vitprune_env.envs.actions import ActionKind
from vitprune_env.envs.parallel import make_game
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.game.rewards import RewardFn, TeamOutcome
from vitprune_env.types import Site

Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class SingleAgentVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`SingleAgentEnv` for `num_envs` images at once, which go through the network together.

    | | |
    |---|---|
    | Observation | `[num_envs, (P + N) * (D + 1)]` float32, each row as in `SingleAgentEnv` |
    | Action | `[num_envs, N]`, one per token; those of pruned tokens are ignored |
    | Reward | `[num_envs]` float64, the sum over all tokens of an image |
    | Termination | `[num_envs]` bool, all at once after T steps; nothing is ever truncated |
    | Info | `alive` `[num_envs, N]`; `parked` and `action_mask` where `SingleAgentEnv` has them; at the end `correct` \
      `[num_envs]`, `macs` `[num_envs]`, `n_kept` `[num_envs, T]`; beside each the flags `_alive` etc. of Gymnasium |

    After the end, the next step ignores its actions and begins new games (`AutoresetMode.NEXT_STEP`). A seed is that of
    one stream, which draws the images of all games without repetition until the dataset has been gone through.

    Example:
        >>> envs = gymnasium.make_vec("vitprune/TokenPruning-v0", num_envs=8)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())

    Version history:
        v0: initial version.

    Args:
        num_envs: images at once.
        backbone: see `SingleAgentEnv`, as all that follow.
        dataset: where the images come from.
        sites: where to prune.
        reward: summed over tokens; None: `TeamOutcome()`.
        needs: evidence to compute at each site.
        device: device to move the backbone to.
        action_space: an `ActionKind`, or the name of a built-in one.
        attention_bias: `"log_size"` or None.

    Attributes:
        tokens: the `TokenVectorEnv` that is played.

    Raises:
        ValueError: for an unknown action space, an empty or missing dataset, or `num_envs` below 1.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": ()}

    def __init__(
        self,
        num_envs: int = 1,
        backbone: Backbone | nn.Module | str | None = None,
        dataset: ImageDataset | None = None,
        sites: Sequence[int | str | Site] | None = None,
        reward: RewardFn | None = None,
        needs: frozenset[str] = frozenset(),
        device: str | torch.device | None = None,
        action_space: ActionKind | str = "keep",
        attention_bias: str | None = None,
    ) -> None:
        reward = TeamOutcome() if reward is None else reward
        game, images, kind = make_game(backbone, dataset, sites, reward, needs, device, action_space, attention_bias)
        self.tokens = TokenVectorEnv(game, images, num_envs, action_space=kind)
        self.num_envs = num_envs
        size = (game.backbone.num_prefix + game.num_agents) * (game.backbone.embed_dim + 1)
        self.single_observation_space = Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = self.tokens.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin games with the next images.

        Args:
            seed: of the environment's own random stream, which draws the images; None: go on with it.
            options: `{"indices": [num_envs]}` plays these items of the dataset instead.

        Raises:
            ValueError: for a negative seed, indices that do not fit the dataset, or images or labels that do not fit
                the model.
        """
        check_seed(seed)
        super().reset(seed=seed)
        _, infos = self.tokens.reset(seed=seed, options=options)
        self._np_random, self._over = self.tokens.np_random, False
        return self._observations(), _as_infos(infos)

    def step(self, actions: np.ndarray) -> Step:
        """Take the actions of all tokens of all images and run the network up to the next site, or to the end.

        Args:
            actions: `[num_envs, N]`, see the table above.

        Returns:
            Observations, rewards, terminations, truncations and infos.

        Raises:
            ValueError: for actions of another shape, dtype or value.
            RuntimeError: before the first `reset`.
        """
        never = np.zeros(self.num_envs, dtype=np.bool_)
        if self._over:
            observations, infos = self.reset()
            return observations, np.zeros(self.num_envs), never, never.copy(), infos
        _, rewards, terminations, _, infos = self.tokens.step(actions)
        self._over = bool(terminations.all())
        paid = rewards.double().sum(dim=1).cpu().numpy()
        return self._observations(), paid, never | self._over, never, _as_infos(infos)

    def _observations(self) -> np.ndarray:
        return self.tokens.state().cpu().numpy()


def _as_infos(infos: dict[str, Any]) -> dict[str, Any]:
    """Tensors as arrays, each with the flags that say which games have it: all, as they keep step."""
    arrays = {name: value.cpu().numpy() for name, value in infos.items() if name != "logits"}
    return arrays | {f"_{name}": np.ones(len(value), dtype=np.bool_) for name, value in arrays.items()}
