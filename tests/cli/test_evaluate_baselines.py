"""`vitprune evaluate` brings every baseline to a budget, trains what has to be trained, and reads it back."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import everyday
from vitprune_env import TokenGame
from vitprune_env import evaluate as play_all
from vitprune_env.baselines import available, describe
from vitprune_env.cli import evaluate
from vitprune_env.data import Digits
from vitprune_env.errors import SettingsError
from vitprune_env.types import Site


def options(output: Path, *flags: str) -> evaluate.Args:
    return evaluate.parse([*flags, "--quick", "--output", str(output)])


@pytest.fixture
def few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images to calibrate and to fit on, but for one method."""
    if name == "life_regression":
        return
    images = [Digits("train", 12, seed=1), Digits("test", 4), Digits("train", 64)]
    monkeypatch.setattr(evaluate.Args, "_apart", lambda *_: images)


EVERYDAY = ("ats", "distilled_attention", "dpc", "dynamicvit", "evit", "evo_vit", "random", "tome")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", everyday(available(), *EVERYDAY))
def test_every_baseline_meets_the_budget(name: str, tmp_path: Path) -> None:
    args = options(tmp_path, "--policy", name, "--target-share", "0.6")
    policy, backbone = evaluate.load(args)
    game, tune = TokenGame.for_policy(backbone, policy), list(args.tuning(backbone))
    share = play_all(game, policy, tune).macs / game.cost.dense()
    assert 0.6 <= share <= 0.66, "from above, by a few tokens"
    kept = tmp_path / "policy.safetensors"
    assert kept.exists() == (describe(name).recipe is not None)
    if kept.exists():
        again, _ = evaluate.load(options(tmp_path, "--checkpoint", str(kept)))
        assert play_all(game, again, tune) == play_all(game, policy, tune)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", everyday(["ats", "dynamicvit", "evit", "ltmp"], "evit"))
def test_a_saved_baseline_is_brought_to_another_budget(name: str, tmp_path: Path) -> None:
    from vitprune_env import save_policy

    policy, _ = evaluate.load(options(tmp_path, "--policy", name, "--target-share", "0.6"))
    save_policy(policy, tmp_path / "policy.safetensors")
    args = options(tmp_path, "--checkpoint", str(tmp_path), "--target-share", "0.5")
    moved, backbone = evaluate.load(args)
    game = TokenGame.for_policy(backbone, moved)
    assert 0.5 <= play_all(game, moved, args.tuning(backbone)).macs / game.cost.dense() <= 0.56
    assert type(moved) is type(policy)
    assert [Site.parse(site) for site in moved.default_sites(8) or ()] == [
        Site.parse(site) for site in policy.default_sites(8) or ()
    ]


@pytest.mark.parametrize("name", everyday(["random", "topk", "evit", "distilled_attention"], "evit"))
def test_tokens_that_leave_in_another_way_meet_the_budget(name: str, tmp_path: Path) -> None:
    policy, backbone = evaluate.load(options(tmp_path, "--policy", f"{name}:leave=merge", "--target-share", "0.6"))
    args = options(tmp_path)
    assert getattr(policy, "leave", "drop") == "merge"
    game = TokenGame.for_policy(backbone, policy)
    assert 0.6 <= play_all(game, policy, list(args.tuning(backbone))).macs / game.cost.dense() <= 0.66


def test_parameters_of_what_is_trained_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"expected no parameter but leave of masks, .* got \['seed'\]"):
        evaluate.load(options(tmp_path, "--policy", "masks:seed=3", "--target-share", "0.6"))


def test_a_budget_in_gmacs(tmp_path: Path) -> None:
    args = options(tmp_path, "--policy", "topk", "--target-gmacs", "0.02")
    policy, backbone = evaluate.load(args)
    found = play_all(TokenGame.for_policy(backbone, policy), policy, args.tuning(backbone))
    assert found.gmacs == pytest.approx(0.02, rel=0.05)


def test_methods_stand_at_equal_sites_but_for_printed_numbers(tmp_path: Path) -> None:
    for flags, expected in (
        (("--policy", "evit"), None),
        (("--preset", "evit-deit-s-half"), None),
        (("--preset", "evit-deit-s-0.7"), "published"),
        (("--preset", "evit-deit-s-0.7", "--sites", "backbone"), None),
        (("--policy", "evit", "--sites", "2", "4.attn"), ("2", "4.attn")),
        (("--checkpoint", "runs/mappo", "--sites", "published"), None),  # where it was trained
    ):
        assert evaluate.sites_of(options(tmp_path, *flags)) == expected, flags
