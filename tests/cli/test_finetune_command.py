"""`vitprune finetune` for life regression: fitted first, or trained as in the paper, or taken from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import everyday
from vitprune_env import load_backbone, load_policy
from vitprune_env.baselines import LifeRegression
from vitprune_env.cli import main
from vitprune_env.cli.finetune import parse


def finetune(*argv: object) -> None:
    main(["finetune", *map(str, argv)])


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as stopped:
        finetune(*argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows(shown: str) -> dict[str, str]:
    """Of dense cost, by the label of the row."""
    cells = [line.split("|") for line in shown.splitlines() if line.startswith("| ")]
    return {cell[1].strip(): cell[4].strip() for cell in cells}


def weights(path: Path) -> torch.Tensor:
    return load_backbone("vit_digits", checkpoint=path).block(8).mlp.fc1.weight


@pytest.mark.parametrize(
    "flags", everyday([(), ("--scheme", "two_stages", "--sharpness", 1.5), ("--scheme", "single_stage")], ())
)
def test_life_regression_is_trained(
    flags: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ("--policy", "life_regression", "--target-share", 0.5, "--sites", 2, 4, 6)
    finetune("--quick", *budget, *flags, "--output", tmp_path)
    shown = rows(capsys.readouterr().out)
    assert float(shown["life_regression, fine-tuned"]) == pytest.approx(50, abs=1.5)
    policy = load_policy(tmp_path / "policy.safetensors")
    assert isinstance(policy, LifeRegression)
    assert [site.label for site in policy.default_sites(8)] == ["2", "4", "6"]  # type: ignore[union-attr]
    untrained = LifeRegression(policy.keep_rate, 0, 48, (2, 4, 6))
    assert not torch.equal(policy.state_dict()["weight"], untrained.state_dict()["weight"])
    tuned = weights(tmp_path / "backbone.safetensors")
    assert not torch.equal(tuned, load_backbone("vit_digits").block(8).mlp.fc1.weight)
    if not flags:
        file = tmp_path / "policy.safetensors"
        finetune("--quick", "--checkpoint", file, "--output", tmp_path / "again")
        assert torch.equal(weights(tmp_path / "again" / "backbone.safetensors"), tuned), "the same policy from its file"


def test_a_budget_is_a_share_or_gmacs_or_a_keep_rate() -> None:
    backbone = load_backbone("vit_digits")

    def gmacs(*words: str) -> float:
        args = parse(words)
        return args.budget.gmacs(backbone, args.sites)

    dense = gmacs("--target-keep", "1")
    assert gmacs() == pytest.approx(0.25 * dense)
    assert gmacs("--target-share", "0.5") == pytest.approx(0.5 * dense)
    assert gmacs("--target-gmacs", "0.01") == 0.01
    early, late = (gmacs("--target-keep", "0.5", "--sites", site) for site in ("1", "7"))
    assert early < 0.6 * dense < 0.9 * dense < late


def test_flags_that_would_not_be_heard_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--output", tmp_path, "--policy")
    assert "policy: expected life_regression with --scheme" in mistake(capsys, *flags, "evit", "--sharpness", 3)
    line = mistake(capsys, *flags, "life_regression", "--scheme", "two_stages", "--distill", 0.5)
    assert line == "error: --distill: expected 0.0 with --scheme, got 0.5"
    line = mistake(capsys, "--checkpoint", "mine", "--target-share", 0.5, "--output", tmp_path)
    assert line == "error: --target-share: expected none beside --checkpoint, whose policy stays as it is, got 0.5"
    line = mistake(capsys, "--checkpoint", "mine", "--target-keep", 0.5, "--output", tmp_path)
    assert line == "error: --target-keep: expected none beside --checkpoint, whose policy stays as it is, got 0.5"
    assert not any(tmp_path.iterdir()), "before anything was done"
