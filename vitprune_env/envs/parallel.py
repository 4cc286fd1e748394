"""The PettingZoo environment: one image per episode, one agent per patch token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from pettingzoo.utils import AECEnv, ParallelEnv, wrappers
from pettingzoo.utils.conversions import aec_wrapper_fn
from torch import Tensor, nn

from vitprune_env.data import Digits, ImageDataset, fetch
from vitprune_env.data.digits import DIGITS
from vitprune_env.engine.backbone import Backbone
from vitprune_env.engine.evidence import names_of_evidence
from vitprune_env.envs.action_game import ActionGame, option, random_stream
from vitprune_env.envs.actions import ActionKind, action_kind
from vitprune_env.game.rewards import RewardFn
from vitprune_env.game.token_game import TokenGame
from vitprune_env.models.load import load_backbone
from vitprune_env.plots.render import RENDER_MODES, Scene, Viewer, to_rgb
from vitprune_env.policy import Policy
from vitprune_env.types import Decision, Observation, Outcome, Site

PRUNE_MODES = ("noop", "terminate")
BUILT_IN_IMAGES = 4096  # scenes of the built-in task that episodes are drawn from

Features = dict[str, np.ndarray]
Infos = dict[str, dict[str, Any]]
Action = int | np.int64
StepResult = tuple[Features, dict[str, float], dict[str, bool], dict[str, bool], Infos]


class TokenPruningEnv(ParallelEnv[str, np.ndarray, Action]):
    """Every patch token of an image decides at every pruning site whether it stays.

    | | |
    |---|---|
    | Agents | `token_0` to `token_{N-1}`, one per patch, row by row |
    | Observation | `Box(D,)` float32: the token's feature at the site; a waiting token's feature is the one it waits \
      with; zeros once the token is pruned or the game is over |
    | Action | `Discrete(A)`, as the action kind defines it; by default `KeepActions`: 0 = prune, 1 = keep |
    | Reward | that of the game's `RewardFn`; its part that depends on the predicted class is paid in the last step |
    | Termination | depends on the mode, see below; nothing is ever truncated |
    | State | `Box((P + N) * (D + 1),)` float32: prefix tokens, then all patch tokens; after each its alive flag |
    | Info | `{"alive": bool}` for every agent, at reset and after each step; `"parked"`, bool, where tokens wait; \
      `"action_mask"`, `[A]` int8, for action kinds that have one (`MergeActions`) |

    `on_prune="noop"`: pruned agents stay listed to the end, observe zeros, and their actions are ignored. All agents
    terminate together at the last site, where the deferred part of the reward is paid. This is the game of `TokenGame`.

    `on_prune="terminate"`: pruned agents leave at once. *This is another game*: PettingZoo pays no agent after it has
    left, so an agent that leaves is paid at once for a counterfactual outcome, that of finishing the pass from here
    without further pruning. Only the agents that act at the last site are paid for the real outcome. The episode ends
    early when all agents have left. Actions for agents that have left are ignored, whatever they are.

    Waiting tokens are alive in both modes: their agents stay listed and act at every site.

    A model that reads its class from the patch tokens keeps at least one: if all choose to leave, the one with the
    largest norm stays.

    Example:
        >>> env = parallel_env()
        >>> observations, infos = env.reset(seed=0)
        >>> while env.agents:
        ...     actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        ...     observations, rewards, terminations, truncations, infos = env.step(actions)
        >>> macs = env.outcome().macs

    Version history:
        v0: initial version.

    Args:
        game: the game to play. The environment steps it; do not step it elsewhere at the same time.
        dataset: `len(dataset)` pairs `dataset[i] -> (image [C, H, W], label)`, normalised as the model expects. If it
            has a method `to_rgb(images)`, rendering uses it.
        on_prune: `"noop"` or `"terminate"`.
        render_mode: None, `"ansi"`, `"rgb_array"` or `"human"`.
        action_space: an `ActionKind`, or the name of a built-in one: `"keep"` or `"merge"`.

    Attributes:
        actions: the `ActionKind`.

    Raises:
        ValueError: for an unknown mode or action space, or an empty dataset.
    """

    metadata = {"name": "token_pruning_v0", "render_modes": RENDER_MODES, "is_parallelizable": True, "render_fps": 1}

    def __init__(
        self,
        game: TokenGame,
        dataset: ImageDataset,
        on_prune: str = "noop",
        render_mode: str | None = None,
        action_space: ActionKind | str = "keep",
    ) -> None:
        if on_prune not in PRUNE_MODES:
            raise ValueError(f"on_prune: expected one of {PRUNE_MODES}, got {on_prune!r}")
        if not len(dataset):
            raise ValueError("dataset: expected at least one image, got an empty dataset")
        self.game, self.dataset, self.on_prune, self.render_mode = game, dataset, on_prune, render_mode
        self.possible_agents = [f"token_{index}" for index in range(game.num_agents)]
        self.agents = []
        rows, width = game.backbone.num_prefix + game.num_agents, game.backbone.embed_dim
        # All agents share one box, because the bounds of N boxes would take N times the memory.
        self.observation_spaces = dict.fromkeys(self.possible_agents, Box(-np.inf, np.inf, (width,), np.float32))
        self._play = ActionGame(game, action_space)
        self.actions = self._play.kind
        count = self.actions.count(game.num_agents)
        self.action_spaces = {agent: Discrete(count) for agent in self.possible_agents}
        self.state_space = Box(-np.inf, np.inf, (rows * (width + 1),), np.float32)
        self.np_random: np.random.Generator | None = None  # made by the first reset, so that copies do not share it
        self._viewer = Viewer(render_mode, self.metadata["name"])
        self._slots = np.arange(0)  # patch numbers of `agents`
        self._images: Tensor | None = None  # [1, C, H, W] of the current episode; None before the first

    def observation_space(self, agent: str) -> Space[np.ndarray]:
        """The feature of one token, `[D]`."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Space[Action]:
        """`Discrete(A)`; what each number means is in the docstring of the action kind."""
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Features, Infos]:
        """Draw an image and begin a game with it.

        Args:
            seed: of the environment's own random stream, which draws the images; None: go on with it, or begin an
                unpredictable one.
            options: `{"index": i}` plays item i of the dataset instead.

        Raises:
            ValueError: for a negative seed, an index outside the dataset, or an image or label that does not fit the
                model.
        """
        if seed is not None or self.np_random is None:
            self.np_random = random_stream(seed)
        index = option(options, "index")
        if index is None:
            index = int(self.np_random.integers(len(self.dataset)))
        self.agents = []  # no game begins if the image turns out not to fit
        self._images, self._labels = fetch(self.dataset, [index])
        tokens = self._play.reset(self._images, self._labels)
        self.agents, self._slots = self.possible_agents[:], np.arange(self.game.num_agents)
        if self.render_mode == "human":
            self.render()
        return dict(zip(self.agents, _rows(tokens), strict=True)), self._infos(self.agents, self._slots)

    def step(self, actions: Mapping[str, Action]) -> StepResult:
        """Take the actions of all agents and run the network up to the next site, or to the end.

        Args:
            actions: one for each of `agents`; those of pruned tokens are ignored, also where they have left.

        Returns:
            Observations, rewards, terminations, truncations and infos of the agents that acted; empty dicts when the
            episode is over.

        Raises:
            TypeError: for actions that are not a dict.
            ValueError: for an agent that is missing or was never in the game, or an action outside its space, naming
                the agent.
        """
        if not self.agents:
            return {}, {}, {}, {}, {}
        acted, slots = self.agents, self._slots
        choices = torch.zeros(1, self.game.num_agents, dtype=torch.int64)
        choices[0, slots] = torch.tensor(self._read(actions))
        before = self._play.present
        tokens, reward, over = self._play.step(choices)
        left = before & ~self._play.present
        done = np.full(len(slots), over)
        if not over and self.on_prune == "terminate":
            done, reward = left[0].cpu().numpy()[slots], self._settled(reward, left)
        self._slots = slots[~done]
        self.agents = [self.possible_agents[slot] for slot in self._slots.tolist()]
        while not self.agents and len(self.game.steps) < self.game.num_steps:  # all have left: finish the pass
            self.game.step(Decision(keep=self._play.present))
        if self.render_mode == "human":
            self.render()
        return (
            dict(zip(acted, _rows(tokens[:, slots]), strict=True)),
            dict(zip(acted, reward[0].cpu().numpy()[slots].tolist(), strict=True)),
            dict(zip(acted, done.tolist(), strict=True)),
            dict.fromkeys(acted, False),
            self._infos(acted, slots),
        )

    def state(self) -> np.ndarray:
        """Features and alive flags of all tokens, `[(P + N) * (D + 1)]` float32.

        `state().reshape(P + N, D + 1)` has a row per token, prefix tokens first, then the patches (zeros for pruned
        ones). Its last column is 1 for tokens that are alive, waiting ones included. After the end of the episode it
        shows the tokens as the last decision left them.

        Raises:
            RuntimeError: before the first episode.
        """
        if self._images is None:
            raise RuntimeError("state: no game has begun; call reset() first")
        return self._play.state().flatten().cpu().numpy()

    def observation(self) -> Observation:
        """The `Observation` that a `Policy` decides on, with B = 1."""
        return self.game.observation()

    def actions_from(self, policy: Policy) -> dict[str, int]:
        """The actions that a policy would take now; empty when the episode is over.

        The `order` of the policy's decision (ToMe, LTMP) is remembered and applied in the next step. The policy's own
        cost is not, so `outcome().macs` leaves it out.

        Raises:
            ValueError: if the game lacks the evidence that the policy needs, or actions cannot express its decision.
        """
        actions = self._play.actions_from(policy)
        return dict(zip(self.agents, actions[0].cpu().numpy()[self._slots].tolist(), strict=True))

    def outcome(self) -> Outcome:
        """How the episode ended (logits, MACs, tokens kept), with B = 1.

        Raises:
            RuntimeError: before the end.
        """
        return self.game.outcome()

    def render(self) -> np.ndarray | str | None:
        """Show which tokens are left after each site.

        Returns:
            A string in mode ansi; `[H, W, 3]` uint8 in mode rgb_array; None in mode human, which draws in a window.

        Raises:
            RuntimeError: before the first episode.
        """
        if self._images is None:
            raise RuntimeError("render: no game has begun; call reset() first")
        rgb = getattr(self.dataset, "to_rgb", to_rgb)(self._images)[0]
        return self._viewer.draw(Scene.of(self.game, rgb, int(self._labels)))

    def close(self) -> None:
        """Close the window of render mode human."""
        self._viewer.close()

    def _infos(self, agents: Sequence[str], slots: np.ndarray) -> Infos:
        """The facts of `ActionGame.infos` about these agents, one dict per agent."""
        columns: dict[str, Any] = {}
        for name, values in self._play.infos().items():
            rows = values[0].cpu().numpy()[slots]
            columns[name] = rows.astype(np.int8) if name == "action_mask" else rows.tolist()
        facts = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return dict(zip(agents, facts, strict=True))

    def _read(self, actions: Mapping[str, Action]) -> list[int]:
        """The actions of a dict in the order of the agents; frameworks also send some for agents that have left.

        Raises:
            TypeError: for something that is not a dict.
            ValueError: for an agent that is missing or was never in the game, or an action outside the space, naming
                the agent.
        """
        num_agents = self.game.num_agents
        if not isinstance(actions, Mapping):
            raise TypeError(f"actions: expected a dict with one for each of env.agents, got {type(actions).__name__}")
        for agent in actions.keys() - self.action_spaces.keys():
            raise ValueError(f"actions: expected one for each of env.agents; {agent} was never in the game")
        for agent in self.agents:
            if agent not in actions:
                raise ValueError(f"actions: expected one for each of env.agents; {agent} is missing")
            if not _is_below(actions[agent], self.actions.count(num_agents)):
                got = f"{actions[agent]!r} for {agent}"
                raise ValueError(f"actions: expected {self.actions.meaning(num_agents)}, got {got}")
        return [int(actions[agent]) for agent in self.agents]

    def _settled(self, reward: Tensor, left: Tensor) -> Tensor:
        """Add to the reward `[1, N]` of the agents that leave now what is deferred of all their steps.

        It is computed from the counterfactual outcome in which no further token is pruned.
        """
        if not left.any():
            return reward
        deferred = self.game.reward.deferred(self.game.steps, self.game.score_if_kept()).sum(dim=0)
        return torch.where(left, reward + deferred, reward)


def parallel_env(
    backbone: Backbone | nn.Module | str | None = None,
    dataset: ImageDataset | None = None,
    on_prune: str = "noop",
    sites: Sequence[int | str | Site] | None = None,
    reward: RewardFn | None = None,
    render_mode: str | None = None,
    needs: frozenset[str] = frozenset(),
    device: str | torch.device | None = None,
    action_space: ActionKind | str = "keep",
    attention_bias: str | None = None,
) -> TokenPruningEnv:
    """Make the environment; without arguments, with the built-in backbone and task.

    Args:
        backbone: the network to prune: a `Backbone`, or a name or timm module for `load_backbone`; None: the built-in
            one.
        dataset: where the images come from; None: training scenes of the built-in task.
        on_prune: whether pruned agents stay listed (`"noop"`) or leave (`"terminate"`), see `TokenPruningEnv`.
        sites: where to prune; None: the backbone's own.
        reward: the reward function; None: `SharedOutcome()`.
        render_mode: None, `"ansi"`, `"rgb_array"` or `"human"`.
        needs: evidence to compute at each site, for policies played through `actions_from`.
        device: device to move the backbone to; None: it stays on its own.
        action_space: an `ActionKind`, or the name of a built-in one: `"keep"`, `"keep_or_merge"`, `"keep_or_fuse"`,
            `"drop_merge_keep"` or `"merge"`.
        attention_bias: `"log_size"` lets a merged token count as often as the patches in it (proportional attention).

    Raises:
        ValueError: for what `TokenPruningEnv` refuses, or no dataset beside a network that the built-in task does not
            fit.
    """
    game, images, kind = make_game(backbone, dataset, sites, reward, needs, device, action_space, attention_bias)
    return TokenPruningEnv(game, images, on_prune, render_mode, kind)


def make_game(
    backbone: Backbone | nn.Module | str | None,
    dataset: ImageDataset | None,
    sites: Sequence[int | str | Site] | None,
    reward: RewardFn | None,
    needs: frozenset[str],
    device: str | torch.device | None,
    action_space: ActionKind | str,
    attention_bias: str | None,
) -> tuple[TokenGame, ImageDataset, ActionKind]:
    """Game, images and action kind from the arguments of `parallel_env`.

    Raises:
        ValueError: for no dataset beside a network that the built-in task does not fit.
    """
    network = backbone if isinstance(backbone, Backbone) else load_backbone(backbone or "vit_digits")
    images = _built_in_images(network) if dataset is None else dataset
    network = network if device is None else network.to(device)
    kind = action_kind(action_space)
    game = TokenGame(
        network, sites, reward, names_of_evidence(needs) | kind.needs, attention_bias or kind.attention_bias
    )
    return game, images, kind


def _built_in_images(backbone: Backbone) -> Digits:
    """Training scenes of the built-in task.

    Raises:
        ValueError: for a network that takes other images, or knows fewer classes.
    """
    task, taken = [3, DIGITS.canvas, DIGITS.canvas], [backbone.in_chans, *backbone.image_size]
    if task != taken or backbone.num_classes < len(Digits.classes):
        raise ValueError(
            f"dataset: expected images {taken} of up to {backbone.num_classes} classes for {backbone.name}, got None; "
            f"the built-in task has images {task} of {len(Digits.classes)} classes"
        )
    return Digits("train", size=BUILT_IN_IMAGES)


raw_env = aec_wrapper_fn(parallel_env)  # agents act one after the other (AEC); takes the arguments of parallel_env


def env(**kwargs: Any) -> AECEnv[str, np.ndarray, Action | None]:
    """`raw_env` with PettingZoo's usual checks; takes the arguments of `parallel_env`."""
    return wrappers.OrderEnforcingWrapper(wrappers.AssertOutOfBoundsWrapper(raw_env(**kwargs)))


def _rows(tokens: Tensor) -> np.ndarray:
    """`[1, n, D]` as a read-only array `[n, D]`; the agents' observations are views of its rows."""
    rows = tokens[0].detach().float().cpu().numpy()
    rows.setflags(write=False)
    return rows


def _is_below(action: Any, count: int) -> bool:
    """Whether an action is a whole number from 0 to `count - 1`, of whatever type."""
    try:
        return 0 <= int(action) < count and bool(int(action) == action)
    except (TypeError, ValueError, OverflowError):
        return False
