"""The batched game as a BenchMARL task."""

# pyright: reportMissingImports=false
# BenchMARL is an optional extra.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitprune_env.data import ImageDataset
from vitprune_env.engine.backbone import Backbone
from vitprune_env.envs.actions import ActionKind, action_kind
from vitprune_env.envs.vector import TokenVectorEnv
from vitprune_env.errors import MissingPackageError
from vitprune_env.game.rewards import RewardFn
from vitprune_env.game.token_game import TokenGame
from vitprune_env.types import Site

try:
    from benchmarl.environments.common import TaskClass
except ImportError as error:
    raise MissingPackageError(
        f"TokenTask: expected BenchMARL, got {error}; pip install vitprune_env[benchmarl]"
    ) from error

from tensordict import TensorDictBase
from torchrl.data import Composite
from torchrl.envs import EnvBase

from vitprune_env.integrations.torchrl import ACTION_MASK, GROUP, STATE, TokenEnv


class TokenTask(TaskClass):
    """Token pruning as a task for `benchmarl.experiment.Experiment`.

    An environment of the experiment is a `TokenEnv` with as many images as BenchMARL asks for environments; a frame is
    one image at one site, so an episode is T frames. Accuracy and GMACs of the games that ended are logged.

    The experiment stores the task, network and images included, in its folder.

    Example:
        >>> task = TokenTask(load_backbone(), Digits("train", size=2048), reward=SharedOutcome(price=0.02))
        >>> Experiment(task, MappoConfig.get_from_yaml(), MlpConfig.get_from_yaml(), seed=0, config=config).run()

    Args:
        backbone: the network to prune; it is moved to the experiment's sampling device.
        data: where the images come from, for training and for BenchMARL's evaluations.
        sites: where to prune; None: the backbone's own.
        reward: the reward function; None: `SharedOutcome()`.
        action_space: an `ActionKind`, or the name of a built-in one.
        state: whether centralised critics read the state instead of all observations.
        name: of the task, for logs and folders.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: ImageDataset,
        sites: Sequence[int | str | Site] | None = None,
        reward: RewardFn | None = None,
        action_space: ActionKind | str = "keep",
        state: bool = False,
        name: str = "token_pruning",
    ) -> None:
        kind = action_kind(action_space)
        needs: dict[str, Any] = {"needs": kind.needs, "attention_bias": kind.attention_bias}
        self._games = backbone, {"sites": sites, "reward": reward, **needs}
        self._data, self._kind, self._state = data, kind, state
        game = self._game()  # refuses bad arguments before an experiment begins
        facts = {"sites": [site.label for site in game.sites], "reward": str(game.reward), "actions": kind.name}
        super().__init__(name, {"backbone": backbone.name, "images": len(data), **facts})

    def _game(self) -> TokenGame:
        backbone, rules = self._games
        return TokenGame(backbone, **rules)

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: torch.device | str | int
    ) -> Callable[[], EnvBase]:
        """A function that makes an environment of `num_envs` images."""

        def make() -> EnvBase:
            self._games[0].to(device)
            return TokenEnv(TokenVectorEnv(self._game(), self._data, num_envs, seed, self._kind), self._state)

        return make

    def supports_continuous_actions(self) -> bool:
        """No."""
        return False

    def supports_discrete_actions(self) -> bool:
        """Yes."""
        return True

    def max_steps(self, env: EnvBase) -> int:
        """T."""
        return self._game().num_steps

    def has_render(self, env: EnvBase) -> bool:
        """No."""
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        """One group with all tokens."""
        return env.group_map

    def observation_spec(self, env: EnvBase) -> Composite:
        """What policies read: the tokens' features."""
        return _one_entry(env.full_observation_spec_unbatched, "observation")

    def action_spec(self, env: EnvBase) -> Composite:
        """One action per token."""
        spec = env.full_action_spec_unbatched.clone()
        spec[GROUP, "action"].update_mask(None)  # masks come with the observations
        return spec

    def action_mask_spec(self, env: EnvBase) -> Composite:
        """Which actions make sense, for pruned tokens only 0."""
        return _one_entry(env.full_observation_spec_unbatched, ACTION_MASK)

    def state_spec(self, env: EnvBase) -> Composite | None:
        """The state where it was asked for; without it critics read all observations."""
        return Composite({STATE: env.full_observation_spec_unbatched[STATE].clone()}) if self._state else None

    def info_spec(self, env: EnvBase) -> None:
        """There is none; outcomes are logged by `log_info`."""

    @staticmethod
    def env_name() -> str:
        """Stands in the logs."""
        return "vitprune"

    @staticmethod
    def log_info(batch: TensorDictBase) -> dict[str, float]:
        """Accuracy and mean GMACs of the games that ended in this batch."""
        ended = batch["next", "done"].squeeze(-1)
        if not ended.any():
            return {}
        outcome = batch["next", "outcome"][ended]
        return {
            "collection/accuracy": outcome["correct"].float().mean().item(),
            "collection/gmacs": outcome["macs"].mean().item() / 1e9,
        }


def _one_entry(spec: Composite, name: str) -> Composite:
    """The group with one of its entries."""
    return Composite({GROUP: Composite({name: spec[GROUP, name].clone()}, shape=spec[GROUP].shape)})
