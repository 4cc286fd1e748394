"""What a file says of a policy and of its network: public names and settings, as JSON values.

A policy is `{"name": "evit", "config": {"keep_rate": 0.7, "fuse": true}}`, by a name of `register_policy`. A network is
`{"name": ..., "architecture": ..., "options": {...}, "pretrained_cfg": {...}, "sites": [...]}`, where the architecture
is a name of timm or of `register_backbone`. Names are looked up, never imported; of the options only the checked ones
below reach timm. Whatever could not be built again is refused when it is described, that is, before it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitprune_env.engine.backbone import Backbone
from vitprune_env.errors import CheckpointError
from vitprune_env.models import converted
from vitprune_env.models.load import is_registered, is_timm_name, load_backbone
from vitprune_env.policy import Policy, registered_name, registered_policy

DO_NOT_FIT = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)  # settings or tensors, and their class


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Name and settings of a policy; the tensors of one that is a module are saved beside them.

    Raises:
        CheckpointError: for a class that is not registered, settings that JSON cannot hold, or a policy that differs
            from the one that its settings build.
    """
    kind = type(policy)
    name = registered_name(kind)
    if not hasattr(kind, "decide"):
        raise CheckpointError(f"policy: expected an object with a method decide, got {policy!r}")
    if name is None:
        raise CheckpointError(
            f"policy: expected a registered class, got {kind.__module__}.{kind.__qualname__}; "
            f"vitprune_env.register_policy('a_name', {kind.__name__}) lets it be saved and loaded"
        )
    description = {"name": name, "config": _json(_settings(policy), f"{kind.__name__}.config()")}
    with torch.random.fork_rng(devices=[]):  # a constructor may draw initial weights
        again = build_policy(description)
    if _json(_settings(again), name) != description["config"] or _parts(again) != _parts(policy):
        raise CheckpointError(
            f"policy: a {kind.__name__} built from its config() differs from this one; expected config() to hold all "
            f"settings, and modules that the constructor makes ({_difference(_parts(policy), _parts(again))})"
        )
    return description


def build_policy(description: Mapping[str, Any]) -> Policy:
    """The policy that `describe_policy` described, its tensors yet to be loaded.

    Raises:
        CheckpointError: for a name that is not registered, or settings that the class does not take.
    """
    name, config = description["name"], description["config"]
    kind = registered_policy(name) if isinstance(name, str) else None
    if kind is None:
        raise CheckpointError(
            f"policy: {name!r} is not registered; import the module of its class, or call "
            f"vitprune_env.register_policy({name!r}, <its class>), before loading it"
        )
    try:
        policy = getattr(kind, "from_config", kind)(**config)
    except DO_NOT_FIT as error:
        raise CheckpointError(f"policy: {name!r} does not take its settings ({error})") from error
    if not isinstance(policy, Policy):
        raise CheckpointError(f"policy: {name!r} is not a policy: {kind.__name__} lacks attributes of Policy")
    return policy


def _settings(policy: Policy) -> dict[str, Any]:
    """What `config()` returns, or the fields of a dataclass.

    Raises:
        CheckpointError: if `config()` fails, as it does for a policy whose parts are not those it was written for.
    """
    if hasattr(policy, "config"):
        try:
            return dict(policy.config())  # pyright: ignore[reportAttributeAccessIssue]
        except DO_NOT_FIT as error:
            raise CheckpointError(f"policy: {type(policy).__name__}.config() fails ({error})") from error
    if is_dataclass(policy):
        return {field.name: getattr(policy, field.name) for field in fields(policy) if field.init}
    return {}


def _json(value: Any, where: str) -> Any:
    """A value as JSON brings it back, tuples as lists.

    Raises:
        CheckpointError: naming a setting that JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise CheckpointError(f"policy: {where} has settings that JSON cannot hold ({type(value).__name__})")


def _parts(policy: Policy) -> dict[str, str]:
    """What must be the same in a policy and in the one that its settings build, by name.

    These are the types and settings of submodules, and the shapes of tensors. A class without `config()` that is no
    dataclass has no settings, so its public attributes must come from the constructor alone.
    """
    parts: dict[str, str] = {}
    if isinstance(policy, nn.Module):
        for name, module in policy.named_modules():
            parts[name or "policy"] = f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"
        parts.update(_shapes(policy))
    if not hasattr(policy, "config") and not is_dataclass(policy):
        public = (name for name in vars(policy) if not name.startswith("_") and name != "training")
        parts.update({name: repr(getattr(policy, name)) for name in public})
    return parts


def _shapes(module: nn.Module) -> dict[str, str]:
    """Shapes of all parameters and buffers."""
    return {
        name: str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
        for name, value in module.state_dict().items()
    }


def _difference(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """The first part that differs, in words."""
    for name in [*first, *second]:
        if first.get(name) != second.get(name):
            return f"{name}: {first.get(name, 'missing')}, built again {second.get(name, 'missing')}"
    return "its settings"


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """What `build_backbone` needs to build a network of the same sizes.

    Raises:
        CheckpointError: if neither timm nor a registered builder makes a network that, given the weights of this one,
            computes the same.
    """
    network = cast(Any, backbone.model)
    cfg = getattr(network, "pretrained_cfg", None)
    cfg = dict(cfg) if isinstance(cfg, Mapping) else {}
    architecture = backbone.name if _is_known(backbone.name) else str(cfg.get("architecture"))
    sizes = {
        "img_size": list(backbone.image_size),
        "in_chans": backbone.in_chans,
        "num_classes": backbone.num_classes,
        "global_pool": network.global_pool,
    }
    description = {
        "name": backbone.name,
        "architecture": architecture,
        "options": {} if is_registered(architecture) else {**getattr(network, "options", {}), **sizes},
        "pretrained_cfg": {name: _listed(cfg[name]) for name, fits in PRETRAINED_CFG.items() if fits(cfg.get(name))},
        "sites": [site.label for site in backbone.default_sites],
    }
    if backbone.class_names is not None:
        description["class_names"] = list(backbone.class_names)
    hint = "vitprune_env.register_backbone(name, builder) and Backbone(model, name) let a network of any sizes be saved"
    try:
        with torch.random.fork_rng(devices=[]):
            again = build_backbone(description)
    except DO_NOT_FIT as error:
        raise CheckpointError(
            f"backbone: {backbone.name!r} cannot be built again from the name {architecture!r} ({error}); {hint}"
        ) from error
    if _shapes(backbone) != _shapes(again):
        raise CheckpointError(
            f"backbone: a fresh {architecture!r} has other parameters than this one "
            f"({_difference(_shapes(backbone), _shapes(again))}); {hint}"
        )
    if not _computes_the_same(backbone, again):
        raise CheckpointError(
            f"backbone: {architecture!r} with the weights of {backbone.name!r} computes other logits (another number "
            f"of heads, another norm or activation?); {hint}"
        )
    return description


def build_backbone(description: Mapping[str, Any]) -> Backbone:
    """The network that `describe_backbone` described, its weights yet to be loaded.

    Raises:
        CheckpointError: for an architecture that is neither registered nor timm's, or options outside `OPTIONS`.
        UnsupportedBackboneError: for an architecture of timm that the game cannot walk.
    """
    architecture, options = description["architecture"], description["options"]
    if not isinstance(architecture, str) or not _is_known(architecture):
        raise CheckpointError(
            f"backbone: {architecture!r} is neither registered nor an architecture of timm; call "
            f"vitprune_env.register_backbone({architecture!r}, <its builder>) before loading it"
        )
    _check("options", options, {**OPTIONS, **converted.OPTIONS} if architecture == converted.ARCHITECTURE else OPTIONS)
    _check("pretrained_cfg", description["pretrained_cfg"], PRETRAINED_CFG)
    backbone = load_backbone(
        architecture, sites=description["sites"], class_names=description.get("class_names"), **options
    )
    backbone.name = str(description["name"])
    network, cfg = cast(Any, backbone.model), description["pretrained_cfg"]
    if cfg:
        cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
        network.pretrained_cfg = {**(getattr(network, "pretrained_cfg", None) or {}), **cfg}
    return backbone


def _is_known(architecture: str) -> bool:
    return is_registered(architecture) or is_timm_name(architecture)


def _computes_the_same(backbone: Backbone, again: Backbone) -> bool:
    """Whether a second network, given the weights of the first, gives the same logits on a random image."""
    again.load_state_dict(backbone.state_dict(), assign=True)
    weight = next(backbone.parameters())
    image = torch.randn(1, backbone.in_chans, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        with torch.no_grad():
            ours, theirs = (net.to(weight.device)(image.to(weight)).float() for net in (backbone, again))
    finally:
        for module, mode in modes:
            module.training = mode
    tolerance = torch.finfo(weight.dtype).eps ** 0.5 * float(ours.abs().max())
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_row(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(is_valid, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Checks = Mapping[str, Callable[[Any], bool]]
OPTIONS: Checks = {  # of timm.create_model
    "img_size": lambda value: _is_row(value, _is_count) and len(value) == 2,
    "in_chans": _is_count,
    "num_classes": _is_count,
    "global_pool": lambda value: value in ("token", "avg", "map", "token_and_mean"),
}
PRETRAINED_CFG: Checks = {  # how image files are prepared
    "input_size": lambda value: _is_row(value, _is_count) and len(value) == 3,
    "mean": lambda value: _is_row(value, _is_number),
    "std": lambda value: _is_row(value, _is_number),
    "crop_pct": _is_number,
    "crop_mode": lambda value: isinstance(value, str),
    "interpolation": lambda value: isinstance(value, str),
}


def _check(what: str, values: Any, checks: Checks) -> None:
    """Refuse values that are not known by name or not of their type.

    Raises:
        CheckpointError: naming the value.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"backbone: expected {what} by name, got {values!r}")
    for name, value in values.items():
        if name not in checks or not checks[name](value):
            raise CheckpointError(f"backbone: expected {what} among {', '.join(checks)}, got {name}={value!r}")
