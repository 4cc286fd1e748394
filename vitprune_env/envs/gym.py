"""The Gymnasium environment: one agent decides for all tokens of an image at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from vitprune_env.data import ImageDataset
from vitprune_env.engine.backbone import Backbone
from vitprune_env.envs.action_game import check_seed
from vitprune_env.envs.actions import ActionKind
from vitprune_env.envs.parallel import Action, parallel_env
from vitprune_env.game.rewards import RewardFn, TeamOutcome
from vitprune_env.plots.render import RENDER_MODES
from vitprune_env.policy import Policy
from vitprune_env.types import Observation, Outcome, Site


class SingleAgentEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One agent decides at every pruning site which tokens of an image stay.

    It is the game of `parallel_env(on_prune="noop")` with all agents taken together: the observation is that
    environment's `state()`, an action holds one action per token, and the reward is the sum over all tokens.

    | | |
    |---|---|
    | Observation | `Box((P + N) * (D + 1),)` float32: prefix tokens, then all patch tokens; after each its alive flag |
    | Action | the joint space of the action kind; by default that of `KeepActions`, `MultiBinary(N)`: 0 = prune, \
      1 = keep; ignored for pruned tokens |
    | Reward | the sum over all tokens of a `RewardFn`; by default `TeamOutcome`: the image's outcome minus the price \
      of every token kept |
    | Termination | after T steps, one per pruning site; nothing is ever truncated |
    | Info | `alive` `[N]` bool; `parked` `[N]` bool where tokens wait; `action_mask` `[N, A]` for action kinds that \
      have one; at the end `correct`, `macs`, `n_kept` `[T]` |

    At the end, the observation shows the tokens as the last decision left them.

    Example:
        >>> env = gymnasium.make("vitprune/TokenPruning-v0")
        >>> observation, info = env.reset(seed=0)
        >>> terminated = False
        >>> while not terminated:
        ...     observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        >>> macs = info["macs"]

    Version history:
        v0: initial version.

    Args:
        backbone: the network to prune: a `Backbone`, or a name or timm module for `load_backbone`; None: the built-in
            one.
        dataset: where the images come from; None: training scenes of the built-in task.
        sites: where to prune; None: the backbone's own.
        reward: the reward function, which is summed over tokens; None: `TeamOutcome()`.
        render_mode: None, `"ansi"`, `"rgb_array"` or `"human"`.
        needs: evidence to compute at each site, for policies played through `action_from`.
        device: device to move the backbone to; None: it stays on its own.
        action_space: an `ActionKind`, or the name of a built-in one: `"keep"` or `"merge"`.
        attention_bias: `"log_size"` lets a merged token count as often as the patches in it.

    Raises:
        ValueError: for an unknown mode or action space, or an empty dataset.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 1}

    def __init__(
        self,
        backbone: Backbone | nn.Module | str | None = None,
        dataset: ImageDataset | None = None,
        sites: Sequence[int | str | Site] | None = None,
        reward: RewardFn | None = None,
        render_mode: str | None = None,
        needs: frozenset[str] = frozenset(),
        device: str | torch.device | None = None,
        action_space: ActionKind | str = "keep",
        attention_bias: str | None = None,
    ) -> None:
        self.tokens = parallel_env(
            backbone,
            dataset,
            sites=sites,
            reward=TeamOutcome() if reward is None else reward,
            render_mode=render_mode,
            needs=needs,
            device=device,
            action_space=action_space,
            attention_bias=attention_bias,
        )
        self.render_mode = render_mode
        self.observation_space = self.tokens.state_space
        self.action_space = self.tokens.actions.joint_space(self.tokens.game.num_agents)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw an image and begin a game with it.

        Args:
            seed: of the environment's own random stream, which draws the images; None: go on with it.
            options: `{"index": i}` plays item i of the dataset instead.

        Raises:
            ValueError: for a negative seed, an index outside the dataset, or an image or label that does not fit the
                model.
        """
        check_seed(seed)
        super().reset(seed=seed)
        self.tokens.np_random = self.np_random
        _, infos = self.tokens.reset(options=options)
        return self.tokens.state(), self._info(infos)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take the actions of all tokens and run the network up to the next site, or to the end.

        Args:
            action: `[N]`, one per token; those of pruned tokens are ignored.

        Returns:
            Observation, reward, terminated, truncated and info.

        Raises:
            ValueError: for an action of another shape, or a token's action outside its space.
            RuntimeError: when the game is over, or none has begun.
        """
        if not self.tokens.agents:
            raise RuntimeError("step: no game is being played; call reset() first")
        _, rewards, _, _, infos = self.tokens.step(self._per_token(action))
        terminated = not self.tokens.agents
        info = self._info(infos)
        if terminated:
            outcome = self.outcome()
            assert outcome.correct is not None
            info |= {"correct": bool(outcome.correct), "macs": float(outcome.macs)}
            info["n_kept"] = outcome.n_kept[0].cpu().numpy()
        return self.tokens.state(), float(sum(rewards.values())), terminated, False, info

    def observation(self) -> Observation:
        """The `Observation` that a `Policy` decides on, with B = 1."""
        return self.tokens.observation()

    def action_from(self, policy: Policy) -> np.ndarray:
        """The action `[N]` that a policy would take now, see `TokenPruningEnv.actions_from`.

        Raises:
            ValueError: if the game lacks the evidence that the policy needs, or actions cannot express its decision.
            RuntimeError: when the game is over, or none has begun.
        """
        if not self.tokens.agents:
            raise RuntimeError("action_from: no game is being played; call reset() first")
        return np.fromiter(self.tokens.actions_from(policy).values(), self.action_space.dtype)

    def outcome(self) -> Outcome:
        """How the game ended (logits, MACs, tokens kept), with B = 1.

        Raises:
            RuntimeError: before the end.
        """
        return self.tokens.outcome()

    def render(self) -> Any:
        """Show which tokens are left after each site, see `TokenPruningEnv.render`."""
        return self.tokens.render()

    def close(self) -> None:
        """Close the window of render mode human."""
        self.tokens.close()

    def _per_token(self, action: np.ndarray | Tensor | Sequence[int]) -> dict[str, Action]:
        """The action as a dict with one entry per agent."""
        choices = np.asarray(action)
        if choices.shape != (len(self.tokens.agents),):
            wanted = f"one per token, shape [N] = ({len(self.tokens.agents)},)"
            raise ValueError(f"action: expected {wanted}, got {choices.shape}")
        return dict(zip(self.tokens.agents, choices.tolist(), strict=True))

    def _info(self, infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The agents' infos as one array per name."""
        names = next(iter(infos.values()))
        return {name: np.stack([np.asarray(info[name]) for info in infos.values()]) for name in names}
