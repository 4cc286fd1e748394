"""The batched environment: B images at once, tensors in and tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode
from torch import Tensor
from torch.utils.data import IterableDataset

from vitprune_env.data import ImageDataset, fetch
from vitprune_env.data.batches import whole_numbers
from vitprune_env.envs.action_game import ActionGame, option, random_stream
from vitprune_env.envs.actions import ActionKind
from vitprune_env.game.token_game import TokenGame
from vitprune_env.policy import Policy
from vitprune_env.types import Observation, Outcome

DEFAULT_NUM_ENVS = 32  # images of a batch drawn from a map-style dataset

VectorStep = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]


class TokenVectorEnv:
    """B games at once, one image each; every patch token of every image is an agent.

    Names follow Gymnasium's `VectorEnv`; the contract differs in that each of the `num_envs` games has N agents, so
    rewards, terminations and truncations are `[B, N]`. The game is that of `parallel_env(on_prune="noop")`.

    | | |
    |---|---|
    | Observation | `[B, N, D]` the tokens' features at the site; a waiting token's feature is the one it waits with; \
      zeros for pruned tokens, and for all once the game is over |
    | Action | `[B, N]` integers 0 to A - 1, as the action kind defines them (also bool where A = 2); by default \
      `KeepActions`: 0 = prune, 1 = keep; ignored for pruned tokens |
    | Reward | `[B, N]`, that of the game's `RewardFn`; its part that depends on the class is paid in the last step |
    | Termination | `[B, N]`, all at once after T steps; nothing is ever truncated |
    | Info | `alive` `[B, N]`; `parked` `[B, N]` where tokens wait; `action_mask` `[B, N, A]` for action kinds that \
      have one; at the end also `correct` `[B]`, `macs` `[B]`, `n_kept` `[B, T]`, `logits` `[B, C]` |

    All games last T steps, so nothing resets by itself (`AutoresetMode.DISABLED`): `reset()` draws the next batch.

    Example:
        >>> venv = TokenVectorEnv(TokenGame(load_backbone()), Digits("train", size=512), num_envs=16, seed=0)
        >>> obs, infos = venv.reset()
        >>> for _ in range(venv.num_steps):
        ...     actions = torch.rand(obs.shape[:2]) < 0.7
        ...     obs, rewards, terminations, truncations, infos = venv.step(actions)
        >>> accuracy = infos["correct"].float().mean()

    Args:
        game: the game to play. The environment steps it; do not step it elsewhere at the same time. Tensors are on the
            device of its backbone.
        data: a map-style dataset of `(image, label)` pairs, with or without `batch(indices)`, or an iterable of
            `(images, labels)` batches such as a DataLoader (a list counts as batches). A dataset is drawn from in
            random order, epoch by epoch. Batches are taken in their order and cut to `num_envs`; what is left of one
            goes to the next `reset`.
        num_envs: B; None: the size of the first batch of an iterable, 32 for a dataset.
        seed: of the environment's own random stream; None: unpredictable, and begun by the first reset, so that copies
            made before it draw other images. The global one is left alone.
        action_space: an `ActionKind`, or the name of a built-in one: `"keep"` or `"merge"`.

    Attributes:
        actions: the `ActionKind`.

    Raises:
        TypeError: for what is no `TokenGame`, or no data.
        ValueError: for an empty dataset, `num_envs` below 1, a negative seed or an unknown action space.
    """

    metadata = {"name": "token_pruning_v0", "autoreset_mode": AutoresetMode.DISABLED, "render_modes": ()}
    render_mode: str | None = None

    def __init__(
        self,
        game: TokenGame,
        data: ImageDataset | Iterable[tuple[Tensor, Tensor]],
        num_envs: int | None = None,
        seed: int | None = None,
        action_space: ActionKind | str = "keep",
    ) -> None:
        if not isinstance(game, TokenGame):
            raise TypeError(f"game: expected a TokenGame, such as TokenGame(backbone), got {type(game).__name__}")
        if not hasattr(data, "__getitem__") and not isinstance(data, Iterable):
            raise TypeError(f"data: expected a dataset or an iterable of (images, labels) batches, got {data!r}")
        if num_envs is not None and whole_numbers("num_envs", [num_envs])[0] < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        self.game = game
        self.data = data
        self._play = ActionGame(game, action_space)
        self.actions = self._play.kind
        self.np_random = None if seed is None else random_stream(seed)
        self._source = _source(data)
        if self.np_random is not None:
            self._source.restart(self.np_random)
        self.num_envs = num_envs or self._source.natural_size(self.np_random or np.random.default_rng())
        self.single_observation_space = Box(-np.inf, np.inf, (game.num_agents, game.backbone.embed_dim), np.float32)
        self.single_action_space = self.actions.joint_space(game.num_agents)

    @cached_property
    def observation_space(self) -> Box:
        """The observations of all games, `[B, N, D]`; made on first use, since its bounds take as much memory."""
        return Box(-np.inf, np.inf, (self.num_envs, *self.single_observation_space.shape), np.float32)

    @cached_property
    def action_space(self) -> MultiBinary | MultiDiscrete:
        """The actions of all games, `[B, N]`."""
        return self.actions.joint_space(self.game.num_agents, self.num_envs)

    @property
    def num_steps(self) -> int:
        """T, how many steps every game lasts."""
        return self.game.num_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Begin games with the next batch.

        Args:
            seed: restart the random stream and the data with this seed; None: go on with them.
            options: `{"indices": [B]}` plays these items of a map-style dataset instead.

        Returns:
            Observations `[B, N, D]` and infos, see the table above.

        Raises:
            ValueError: for a negative seed, images or labels that do not fit the model, or indices that do not fit the
                dataset.
        """
        if seed is not None:
            self.np_random = random_stream(seed)
            self._source.restart(self.np_random)
        elif self.np_random is None:
            self.np_random = np.random.default_rng()
        indices = option(options, "indices")
        images, labels = self._source.draw(self.num_envs, self.np_random) if indices is None else self._pick(indices)
        return self._play.reset(images, labels), self._play.infos()

    def step(self, actions: Tensor | np.ndarray) -> VectorStep:
        """Take the actions of all agents of all games.

        Args:
            actions: `[B, N]` integer or bool, see the table above; those of pruned tokens are ignored.

        Returns:
            Observations `[B, N, D]`, rewards `[B, N]`, terminations `[B, N]`, truncations `[B, N]` and infos.

        Raises:
            ValueError: for actions of another shape, dtype or value.
            RuntimeError: when the games are over, or none has begun.
        """
        tokens, rewards, over = self._play.step(self._checked(torch.as_tensor(actions)))
        infos: dict[str, Any] = self._play.infos()
        terminations = torch.full_like(self._play.present, over)
        if over:
            outcome = self.game.outcome()
            infos |= {name: getattr(outcome, name) for name in ("correct", "macs", "n_kept", "logits")}
        return tokens, rewards, terminations, torch.zeros_like(terminations), infos

    def state(self) -> Tensor:
        """The global state of each game, `[B, (P + N) * (D + 1)]` float32; each row as `TokenPruningEnv.state()`.

        Raises:
            RuntimeError: before the first games.
        """
        return self._play.state().flatten(1)

    def observation(self) -> Observation:
        """The `Observation` that a `Policy` decides on."""
        return self.game.observation()

    def actions_from(self, policy: Policy) -> Tensor:
        """The actions `[B, N]` int64 that a policy would take now, see `TokenPruningEnv.actions_from`.

        Raises:
            ValueError: if the game lacks the evidence that the policy needs, or actions cannot express its decision.
        """
        return self._play.actions_from(policy)

    def outcome(self) -> Outcome:
        """How the games ended.

        Raises:
            RuntimeError: before the end.
        """
        return self.game.outcome()

    def close(self) -> None:
        """Does nothing; part of Gymnasium's interface."""

    def _pick(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        count = len(indices) if hasattr(indices, "__len__") else None
        if not isinstance(self._source, _Indexed) or count != self.num_envs:
            wanted = f"{self.num_envs} items of a map-style dataset"
            got = repr(indices) if count is None else count
            raise ValueError(f"options['indices']: expected {wanted}, got {got} of {type(self.data).__name__}")
        return fetch(self._source.dataset, indices)

    def _checked(self, actions: Tensor) -> Tensor:
        """The actions as int64.

        Raises:
            ValueError: for another shape, dtype or value.
        """
        shape = (self.num_envs, self.game.num_agents)
        count = self.actions.count(shape[1])
        is_whole = not (actions.is_floating_point() or actions.is_complex())
        is_flag = actions.dtype == torch.bool
        if tuple(actions.shape) != shape or not is_whole or (is_flag and count > 2):
            kind = "bool or integers" if count == 2 else "integers"
            got = f"{actions.dtype} of shape {tuple(actions.shape)}"
            raise ValueError(f"actions: expected {kind} of shape [B, N] = {shape}, got {got}")
        chosen = actions.long()
        if self.game.check and ((chosen < 0) | (chosen >= count)).any():
            wrong = int(chosen[(chosen < 0) | (chosen >= count)][0])
            raise ValueError(f"actions: expected {self.actions.meaning(shape[1])}, got {wrong}")
        return chosen


class _Indexed:
    """A map-style dataset, drawn from in random order, epoch by epoch."""

    def __init__(self, dataset: ImageDataset) -> None:
        if not len(dataset):
            raise ValueError("data: expected at least one image, got an empty dataset")
        self.dataset = dataset
        self._waiting = np.arange(0)

    def natural_size(self, _: np.random.Generator) -> int:
        return DEFAULT_NUM_ENVS

    def restart(self, _: np.random.Generator) -> None:
        self._waiting = np.arange(0)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        while len(self._waiting) < count:
            self._waiting = np.concatenate([self._waiting, rng.permutation(len(self.dataset))])
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return fetch(self.dataset, taken.tolist())


class _Batches:
    """An iterable of batches, restarted when it ends; what one draw leaves of a batch goes to the next."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self._stream: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def natural_size(self, rng: np.random.Generator) -> int:
        self._waiting = [self._next(rng)]
        return len(self._waiting[0][1])

    def restart(self, rng: np.random.Generator) -> None:
        self._stream, self._waiting = iter(()), []
        generator = getattr(self.batches, "generator", None)  # a DataLoader's own, which shuffles
        if generator is not None:
            generator.manual_seed(int(rng.integers(2**63)))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        while sum(len(labels) for _, labels in self._waiting) < count:
            self._waiting.append(self._next(rng))
        images, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = [(images[count:], labels[count:])]
        return images[:count], labels[:count]

    def _next(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        # A DataLoader without a generator shuffles and augments with the global random state, so it is seeded here.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(int(rng.integers(2**63)))
            batch = next(self._stream, None)
            if batch is None:
                self._stream = iter(self.batches)
                batch = next(self._stream, None)
        if batch is None or not len(batch[1]):
            raise ValueError("data: expected at least one batch of (images, labels), got an empty dataset")
        return batch[0], batch[1]


def _source(data: ImageDataset | Iterable[tuple[Tensor, Tensor]]) -> _Indexed | _Batches:
    # torch gives every dataset a __getitem__, even iterable ones.
    if hasattr(data, "__getitem__") and not isinstance(data, (list, tuple, IterableDataset)):
        return _Indexed(cast(ImageDataset, data))
    return _Batches(cast(Iterable[tuple[Tensor, Tensor]], data))
