"""The built-in tasks by name, and what knowing the digit's place is worth on them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from vitprune_env import TokenGame, evaluate, load_backbone
from vitprune_env.benchmarking.contestants.oracle import InkOracle, ink_oracle
from vitprune_env.cli import main
from vitprune_env.cli.flags import ImageFlags, TaskName, read_flags
from vitprune_env.cli.oracle import BUDGET, COPIES, Args
from vitprune_env.cli.train import open_task, parse
from vitprune_env.data import TASKS, TWINS, Digits, batches_of
from vitprune_env.errors import BudgetError, SettingsError


def test_commands_know_the_tasks_by_their_names() -> None:
    assert set(get_args(TaskName)) == set(TASKS) == set(COPIES)
    flags, backbone = ImageFlags(task="twins"), load_backbone("vit_digits")
    images = flags.open(backbone, "test", 8, 3)
    assert torch.equal(images.batch(range(8))[0], Digits("test", 8, 3, TWINS).batch(range(8))[0])
    (part,) = flags.open_apart(backbone, ("train", 8, 3))
    assert isinstance(part, Digits)
    assert part.config == TWINS
    task = open_task(parse(["--task", "twins", "--quick"]), backbone)
    assert isinstance(task.training, Digits)
    assert task.training.config == TWINS
    assert Digits("train", 8, 3).config == ImageFlags().open(backbone, "train", 8, 3).config  # type: ignore[union-attr]


def test_a_built_in_task_beside_image_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"task: expected no built-in task beside image files .*, got 'twins'"):
        ImageFlags(task="twins", data_dir=tmp_path).network(0, "cpu")


def test_the_oracle_keeps_the_patches_with_the_most_ink_of_its_copy() -> None:
    backbone, scenes = load_backbone("vit_digits"), Digits("test", 12, config=TWINS)
    game, budget = TokenGame(backbone), 0.2 * TokenGame(backbone).cost.dense() / 1e9
    for copy in (0, 1):
        policy = ink_oracle(backbone, scenes, budget, copy)
        assert policy.count == 6
        with torch.inference_mode():
            found = evaluate(game, policy, batches_of(scenes, 5))
        assert found.keep_per_site == pytest.approx((0.06, 0.06, 0.06))
        assert 0.19 * game.cost.dense() < found.macs <= 0.2 * game.cost.dense()
        left, top, right, bottom = (scenes.boxes(range(12), copy) / 4).unbind(1)  # in patches
        best = policy.ink.topk(6, dim=1).indices
        x, y = best % 10, best // 10
        assert ((x + 1 > left[:, None]) & (x < right[:, None]) & (y + 1 > top[:, None]) & (y < bottom[:, None])).all()
    with pytest.raises(BudgetError, match=r"budget: expected 0\.005\d+ GMACs or more, for one token, got 0\.001"):
        ink_oracle(backbone, scenes, 0.001)


def test_the_oracle_plays_scenes_in_their_order_and_again() -> None:
    policy = InkOracle(1, torch.zeros(5, 4))
    seen = []
    for size in (3, 2, 4):
        policy.reset(size, 4)
        seen += policy.rows.tolist()
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "gmacs"),
    [
        ("", 0.2 * 0.031038),
        ("--target-share 0.5", 0.5 * 0.031038),
        ("--target-gmacs 0.004", 0.004),
        ("--target-keep 1", 0.031038),
        ("--target-keep 0.5", 0.010695),  # 100, 50, 25 and 12.5 tokens in 1, 2, 2 and 3 blocks
    ],
)
def test_the_budget_of_the_oracles_has_three_names(words: str, gmacs: float) -> None:
    backbone = load_backbone("vit_digits")
    args = read_flags(Args, words.split(), "")
    assert args.budget.one(BUDGET).gmacs(backbone) == pytest.approx(gmacs, rel=1e-3)


def test_two_budgets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("oracle", "finetune"):
        with pytest.raises(SystemExit):
            main([command, "--target-gmacs", "0.01", "--target-keep", "0.5"])
        said = "error: --target-gmacs, --target-keep: expected one of them, got 2\n"
        assert capsys.readouterr().err == said


def test_the_oracles_are_shown_beside_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["oracle", "--task", "twins", "--quick", "--output", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == ["dense", "random", "TopK", "EViT", "oracle, smaller", "oracle, larger", "oracle, both"]
    assert table in capsys.readouterr().out
