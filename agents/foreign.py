"""Networks that were trained elsewhere, in any framework, as policies of this package.

>>> policy = ModulePolicy(network, backbone.embed_dim)
>>> print(benchmark({"mine": policy}, backbone, test, budgets=(0.5,)).table())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from ..envs.actions import ActionKind, action_kind
from ..policy import register_policy
from ..types import Site
from .networks import TokenActor
from .policies import TokenPolicy, full_precision

ROWS = 8  # of random numbers on which a module is tried
WRONG = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # what a module may raise on them
UNCOUNTED = {torch.ops.aten.mv: lambda matrix, *_, **__: 2 * matrix[0] * matrix[1]}  # torch's counter leaves it out

Builder = Callable[[], nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register_actor(name: str, builder: Builder) -> None:
    """Give a module of one's own a name under which `ModulePolicy` saves it.

    A saved file holds the name and the weights; whoever loads it registers the same name first.

    Args:
        name: stays the same when the builder is renamed or moved.
        builder: called without arguments; returns the module, with any weights.

    Raises:
        TypeError: for a builder that cannot be called, or a name that is not a string.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string, got {name!r}")
    if not callable(builder) or isinstance(builder, nn.Module):
        raise TypeError(f"builder: expected a function that returns a module, got {builder!r}")
    _BUILDERS[name] = builder


class ModuleActor(nn.Module):
    """A module of any origin with what a `TokenPolicy` asks of its actor."""

    senses: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, embed_dim: int, name: str | None, macs_per_token: int | None) -> None:
        super().__init__()
        self.module, self.embed_dim = module.eval(), embed_dim
        self.name, self.given_macs = name, macs_per_token
        rows, logits = _tried(module, embed_dim)
        self.columns = logits.shape[1]
        self.num_actions = max(2, self.columns)
        self.macs_per_token = count_macs(module, rows) if macs_per_token is None else macs_per_token

    def forward(self, tokens: Tensor) -> Tensor:
        """Token features `[rows, D]` to logits `[rows, A]`."""
        logits = self.module(tokens)
        return logits if self.columns > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)

    def keep_logit(self, tokens: Tensor) -> Tensor:
        """Log-odds of action 1 over action 0, `[rows, D]` to `[rows]`."""
        logits = self.module(tokens)
        return logits[:, 0] if self.columns == 1 else logits[:, 1] - logits[:, 0]


@register_policy("module_policy")
class ModulePolicy(TokenPolicy):
    """A module from token features to logits as a policy, with all that a learnt policy of this package can do.

    Its threshold is calibrated to a budget (`benchmark` and `calibrate_threshold` do), its own MACs are counted, it
    draws actions with `sampling(seed)`, and `PrunedViT` deploys it. To save it, give its builder a name:

        >>> register_actor("tanh_net", build)  # build() makes such a module, with any weights
        >>> save_policy(ModulePolicy(network, backbone.embed_dim, "tanh_net"), "policy.safetensors")

    Args:
        module: `[rows, D]` to `[rows, A]` logits of the actions, or to `[rows, 1]`, the log-odds of action 1 over
            action 0 (of keeping a token over pruning it). It is not copied, and is put in evaluation mode.
        embed_dim: D, the embedding width of the networks that it can prune.
        name: under which `register_actor` knows how to build such a module; only saving asks for it.
        macs_per_token: what one decision costs; None: the matrix products and convolutions that torch's counter sees.
        threshold: see `TokenPolicy`.
        sites: see `TokenPolicy`.
        info: see `TokenPolicy`.
        actions: see `TokenPolicy`.
        seed: see `TokenPolicy`.
        schedule: see `TokenPolicy`.

    Raises:
        ValueError: for a module that does not turn rows into logits, whose rows depend on each other, or of whose
            parts the counter sees no products; for a number of actions that the kind does not have.
        TypeError: for something that is not a module.
    """

    actor: Any  # a ModuleActor

    def __init__(
        self,
        module: nn.Module,
        embed_dim: int,
        name: str | None = None,
        macs_per_token: int | None = None,
        threshold: float = 0.0,
        sites: Sequence[int | str | Site] | None = None,
        info: Mapping[str, Any] | None = None,
        actions: ActionKind | None = None,
        seed: int | None = None,
        schedule: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {module!r}")
        actor = cast(Any, ModuleActor(module, embed_dim, name, macs_per_token))
        super().__init__(actor, threshold, sites, info, actions, seed, schedule)

    def _like(self, threshold: float, seed: int | None, schedule: Sequence[float] | None = None) -> ModulePolicy:
        made = ModulePolicy.__new__(ModulePolicy)  # the module was tried before
        TokenPolicy.__init__(made, self.actor, threshold, self.sites, self.info, self.actions, seed, schedule)
        return made

    def starting_actor(self) -> TokenActor:
        """Refuse to go on training what another framework trained.

        Raises:
            TypeError: always.
        """
        raise TypeError("start: expected a policy with a TokenActor, got a ModulePolicy")

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs beside the module's weights, as JSON values.

        Raises:
            ValueError: for a module without a registered name.
        """
        name = self.actor.name
        if name not in _BUILDERS:
            hint = "vitprune_env.agents.register_actor(name, builder) and ModulePolicy(..., name) let it be saved"
            raise ValueError(f"name: expected one that is registered, got {name!r}; {hint}")
        macs = self.actor.given_macs
        return {"embed_dim": self.width, "name": name, "macs_per_token": macs, **self._settings()}

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, embed_dim: int, name: str, actions: str = "keep", **settings: Any
    ) -> ModulePolicy:
        """The policy that gave this `config()`, with the weights that its builder makes.

        Raises:
            ValueError: for a name that is not registered, or a kind of actions that is not known.
        """
        if name not in _BUILDERS:
            hint = f"call vitprune_env.agents.register_actor({name!r}, <its builder>) first"
            raise ValueError(f"name: expected a module that is registered, got {name!r}; {hint}")
        with torch.random.fork_rng(devices=[]):  # most modules draw initial weights
            module = _BUILDERS[name]()
        return cls(module, embed_dim, name, actions=action_kind(actions, "actions"), **settings)


def _tried(module: nn.Module, embed_dim: int) -> tuple[Tensor, Tensor]:
    """Random rows `[ROWS, D]` and the module's logits for them.

    Raises:
        ValueError: if it does not return logits, or those of a row depend on the other rows.
    """
    weight = next(module.parameters(), torch.zeros(1))
    rows = torch.randn(ROWS, embed_dim, generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected = f"module: expected one from [rows, {embed_dim}] to logits [rows, actions] or [rows, 1]"
    try:
        with torch.no_grad(), full_precision(rows.device.type):
            logits, alone = module(rows), module(rows[:1])
    except WRONG as error:
        raise ValueError(f"{expected}, got {type(error).__name__}: {error}") from error
    for result, count in ((logits, ROWS), (alone, 1)):
        if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != count or not result.shape[1]:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{expected}, got {got} for {count} rows")
    if not torch.allclose(logits[:1], alone, rtol=1e-3, atol=1e-4):
        raise ValueError("module: expected the logits of a row to depend on it alone, got others beside other rows")
    return rows, logits


def count_macs(module: nn.Module, rows: Tensor) -> int:
    """MACs of a module for one row, as `torch.utils.flop_counter` sees them.

    Args:
        module: from `[rows, D]` to logits.
        rows: `[rows, D]` to count with.

    Raises:
        ValueError: naming a part that has a matrix of parameters and no products that the counter sees.
    """
    called: set[nn.Module] = set()
    hook = register_module_forward_pre_hook(lambda part, _: called.add(part))
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            module(rows)
    finally:
        hook.remove()
    seen = {name: sum(products.values()) for name, products in counter.get_flop_counts().items()}
    for path, part in module.named_modules():
        name = ".".join(filter(None, [type(module).__name__, path]))
        own = seen.get(name, 0) - sum(seen.get(f"{name}.{child}", 0) for child, _ in part.named_children())
        if part in called and not own and any(min(value.shape) > 1 for value in _matrices(part)):
            what = f"{path or 'the module'} ({type(part).__name__})"
            raise ValueError(f"macs_per_token: expected a number, as the counter sees no products in {what}, got None")
    return counter.get_total_flops() // 2 // len(rows)


def _matrices(part: nn.Module) -> list[Tensor]:
    """Its own parameters, not those of its parts, of at least two dimensions."""
    return [value for value in part.parameters(recurse=False) if value.ndim > 1]
