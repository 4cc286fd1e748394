"""What is drawn: text, pixels, windows and figures."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pettingzoo.test import render_test
from torch.utils.data import TensorDataset

from helpers import random_images, toy
from vitprune_env.envs.parallel import PRUNE_MODES, TokenPruningEnv, env, parallel_env
from vitprune_env.plots.figures import MAX_IMAGES, learning_curve_figure, tokens_figure
from vitprune_env.plots.render import COVER, GONE_EARLIER, GONE_HERE, Scene, Viewer, shade, site_title, to_rgb

NAME = "deit_tiny_patch16_224"  # 4 x 4 patches of 16 pixels, sites 1, 2, 3


def make_env(**options: Any) -> TokenPruningEnv:
    dataset = TensorDataset(random_images(toy(NAME), 4), torch.arange(4))
    return parallel_env(toy(NAME), cast(Any, dataset), **options)


def play(environment: TokenPruningEnv, until: int = 3) -> None:
    """Site s prunes the tokens of row s."""
    environment.reset(options={"index": 2})
    for step in range(until):
        environment.step({a: int(int(a.removeprefix("token_")) // 4 != step) for a in environment.agents})


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_ansi_tells_which_site_pruned_each_token(on_prune: str) -> None:
    environment = make_env(render_mode="ansi", on_prune=on_prune)
    play(environment, until=0)
    assert environment.render() == "\n".join(["# # # #"] * 4 + ["# alive: 16", "class 2, not classified yet"])
    play(environment, until=2)
    assert environment.render() == "\n".join(
        [
            "1 1 1 1",
            "2 2 2 2",
            "# # # #",
            "# # # #",
            "# alive: 8",
            "1 pruned after block 1: 4",
            "2 pruned after block 2: 4",
            "class 2, not classified yet",
        ]
    )
    play(environment)
    predicted = int(environment.outcome().logits.argmax())
    text = environment.render()
    assert isinstance(text, str)
    assert text.splitlines()[:4] == ["1 1 1 1", "2 2 2 2", "3 3 3 3", "# # # #"]
    assert text.splitlines()[-1] == f"class 2, predicted {predicted}"


def test_many_sites_have_marks_too() -> None:
    keep = np.ones((40, 4), dtype=bool)
    keep[9:, 0] = False
    keep[38:, 1] = False
    text = Scene(np.zeros((4, 4, 3)), keep, (2, 2), tuple(str(i) for i in range(1, 41))).ansi()
    assert text.splitlines()[:2] == ["a +", "# #"]


def test_shade_covers_exactly_the_patches_that_are_gone() -> None:
    image = np.full((4, 6, 3), 0.5)
    before = np.array([True, True, False, True, True, True])
    after = np.array([True, False, False, True, True, True])
    out = shade(image, before, after, (2, 3))
    np.testing.assert_allclose(
        out[:2, 2:4], np.broadcast_to(0.5 * (1 - COVER) + COVER * np.array(GONE_HERE), (2, 2, 3))
    )
    np.testing.assert_allclose(
        out[:2, 4:], np.broadcast_to(0.5 * (1 - COVER) + COVER * np.array(GONE_EARLIER), (2, 2, 3))
    )
    np.testing.assert_array_equal(out[2:], image[2:])
    np.testing.assert_array_equal(out[:2, :2], image[:2, :2])
    assert (image == 0.5).all()


@pytest.mark.parametrize("on_prune", PRUNE_MODES)
def test_rgb_array_has_one_panel_per_site_and_never_changes_size(on_prune: str) -> None:
    environment = make_env(render_mode="rgb_array", on_prune=on_prune)
    frames = []
    for until in range(4):
        play(environment, until)
        frame = environment.render()
        assert isinstance(frame, np.ndarray)
        assert frame.dtype == np.uint8
        frames.append(frame)
    assert {frame.shape for frame in frames} == {(256, 4 * 256 + 3 * 10, 3)}
    panels = [frames[-1][:, i * 266 : i * 266 + 256] for i in range(4)]
    original = to_rgb(random_images(toy(NAME), 4)[2:3])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(panels[0][::4, ::4] / 255, original, atol=1 / 255)
    for site in range(3):
        rows = np.split(panels[site + 1], 4)
        for row in range(site):
            assert rows[row].mean() > 215, "pruned earlier: white"
        assert rows[site][..., 0].mean() > rows[site][..., 2].mean() + 80, "pruned here: orange"
        for row in range(site + 1, 4):
            np.testing.assert_array_equal(rows[row], np.split(panels[0], 4)[row], "still there: the image")
    np.testing.assert_array_equal(frames[0][:, 266:522], frames[0][:, 532:788], "sites to come look alike")


def test_a_scene_names_classes() -> None:
    shown = {"image": np.zeros((4, 4, 3)), "keep": np.ones((0, 4), dtype=bool), "grid_size": (2, 2), "sites": ("1",)}
    names = ("ant", "sea_horse")
    assert Scene(**shown, label=1, class_names=names).title == "sea horse, not classified yet"
    assert Scene(**shown, label=1, prediction=0, class_names=names).title == "sea horse, predicted ant"
    assert Scene(**shown, label=1, prediction=0).title == "class 1, predicted 0"


def test_pettingzoo_render_test() -> None:
    dataset = TensorDataset(random_images(toy(NAME), 4), torch.arange(4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="render_mode 'human' shows nothing")
        render_test(lambda render_mode: cast(Any, env(backbone=toy(NAME), dataset=dataset, render_mode=render_mode)))


def test_no_render_mode_warns_and_draws_nothing() -> None:
    environment = make_env()
    environment.reset(seed=0)
    with pytest.warns(UserWarning, match="nothing is drawn without a render_mode"):
        assert environment.render() is None


def test_human_without_a_display_warns_once_and_plays_on() -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    environment = make_env(render_mode="human")
    with pytest.warns(UserWarning, match="'human' shows nothing: .*agg opens no windows; use 'rgb_array'") as caught:
        play(environment)
    assert len(caught) == 1
    assert environment.agents == []
    assert pyplot.get_fignums() == []
    environment.close()


def test_human_survives_a_toolkit_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot open display")

    monkeypatch.setattr(pyplot, "figure", broken)
    environment = make_env(render_mode="human")
    with pytest.warns(UserWarning, match="'human' shows nothing: cannot open display"):
        play(environment)


def test_human_draws_every_step_into_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    class Canvas(FigureCanvasAgg):
        """A toolkit of its own that counts as interactive."""

        required_interactive_framework = "headless"
        drawn: list[Any] = []

        def draw(self) -> None:
            super().draw()
            texts = self.figure.get_suptitle(), [axes.get_xlabel() for axes in self.figure.axes]
            type(self).drawn.append(texts)

        def flush_events(self) -> None:
            pass

    backend = types.ModuleType("toy_backend")
    backend.__dict__["FigureCanvas"] = Canvas
    monkeypatch.setitem(sys.modules, "toy_backend", backend)
    pyplot.switch_backend("module://toy_backend")
    try:
        environment = make_env(render_mode="human")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            play(environment)
        assert len(pyplot.get_fignums()) == 1
        assert len(Canvas.drawn) == 4
        assert Canvas.drawn[0] == ("class 2, not classified yet", ["", "", "", ""])
        title, labels = Canvas.drawn[-1]
        assert title.startswith("class 2, predicted ")
        assert labels == ["", "75% left", "50% left", "25% left"]
        environment.close()
        assert pyplot.get_fignums() == []
        environment.close()
    finally:
        pyplot.switch_backend("agg")


def test_a_dataset_may_undo_its_own_normalisation() -> None:
    class Dark(TensorDataset):
        def to_rgb(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(images)

    dataset = Dark(random_images(toy(NAME), 4), torch.arange(4))
    environment = parallel_env(toy(NAME), cast(Any, dataset), render_mode="rgb_array")
    environment.reset(seed=0)
    frame = environment.render()
    assert isinstance(frame, np.ndarray)
    assert not frame[:, :256].any()


def test_to_rgb() -> None:
    pixels = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).expand(2, 3, 2, 2)
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.5, 1.0)
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(to_rgb(normalised, mean, std), pixels)
    stretched = to_rgb(torch.stack([pixels[0] * 7 - 3, pixels[0] * 0.1]))
    torch.testing.assert_close(stretched, ((pixels - 0.2) / 0.6))
    assert to_rgb(torch.randn(2, 1, 4, 4)).shape == (2, 3, 4, 4)
    assert torch.isfinite(to_rgb(torch.zeros(1, 3, 4, 4))).all()


def test_site_titles() -> None:
    assert [site_title(site) for site in (3, "12", "4.attn")] == ["after block 3", "after block 12", "in block 4"]


def test_tokens_figure() -> None:
    images = torch.randn(3, 3, 8, 12)
    keep = torch.ones(2, 3, 6, dtype=torch.bool)
    keep[0, 1, :3] = False
    keep[1, 1, :] = False
    figure = tokens_figure(images, keep, (2, 3), (3, "6.attn"), titles=["one", "two", "three"])
    figure.canvas.draw()
    assert len(figure.axes) == 9
    assert [axes.get_title() for axes in figure.axes] == ["image", "after block 3", "in block 6", *[""] * 6]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["one", "two", "three"]
    assert [axes.get_xlabel() for axes in figure.axes[3:6]] == ["", "50% left", "0% left"]
    shown = np.asarray(figure.axes[4].images[0].get_array())
    original = np.asarray(figure.axes[3].images[0].get_array())
    np.testing.assert_array_equal(shown[4:], original[4:])
    assert (shown[:4] != original[:4]).any(axis=2).all()


@pytest.mark.parametrize(
    ("images", "keep", "titles", "message"),
    [
        (2, (2, 2, 5), None, r"keep: expected shape \[T, B, N\] = \(2, 2, 6\), got \(2, 2, 5\)"),
        (2, (3, 2, 6), None, "keep: expected shape"),
        (MAX_IMAGES + 1, (2, MAX_IMAGES + 1, 6), None, "images: expected 1 to 8 images, got 9"),
        (2, (2, 2, 6), ["only one"], "titles: expected one for each of 2 images, got 1"),
    ],
)
def test_tokens_figure_refuses_what_does_not_fit(images: int, keep: Any, titles: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_figure(torch.randn(images, 3, 4, 6), torch.ones(keep, dtype=torch.bool), (2, 3), (3, 6), titles)


def test_learning_curve_figure() -> None:
    figure = learning_curve_figure(
        [0, 10, 20],
        [[0.5, 0.7, 0.8], [0.6, 0.7, 1.0]],
        [[0.9, 0.5, 0.4], [0.7, 0.5, 0.2]],
        {"dense": 0.96},
        budget=0.35,
    )
    figure.canvas.draw()
    upper, lower = figure.axes
    np.testing.assert_allclose(np.asarray(upper.lines[0].get_ydata()), [0.55, 0.7, 0.9])
    np.testing.assert_allclose(np.asarray(lower.lines[0].get_ydata()), [0.8, 0.5, 0.3])
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["trained, mean of 2 runs", "dense 96.0%"]
    assert [text.get_text() for text in lower.get_legend().get_texts()][1] == "budget 35%"
    assert lower.get_xlabel() == "updates"
    single = learning_curve_figure([0, 1], [0.5, 0.6], [1.0, 0.5])
    assert [text.get_text() for text in single.axes[0].get_legend().get_texts()] == ["trained"]
    with pytest.raises(ValueError, match="accuracy: expected 2 values per run"):
        learning_curve_figure([0, 1], [0.5, 0.6, 0.7], [1.0, 0.5])
    with pytest.raises(ValueError, match="macs_share: expected 2 values per run"):
        learning_curve_figure([0, 1], [0.5, 0.6], [1.0])
    with pytest.raises(ValueError, match="target: expected 2 values, one for each update, got 1"):
        learning_curve_figure([0, 1], [0.5, 0.6], [1.0, 0.5], target=[0.5])


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="render_mode: expected None or one of"):
        Viewer("film", "title")


def test_importing_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.find_spec("vitprune_env.plots.render")
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    assert fresh.Scene is not Scene


def test_tokens_figure_in_columns_shows_the_images_in_order() -> None:
    keep = torch.ones(2, 3, 6, dtype=torch.bool)
    keep[:, 2] = False
    figure = tokens_figure(torch.randn(3, 3, 8, 12), keep, (2, 3), (3, 6), titles=["a", "b", "c"], columns=2)
    figure.canvas.draw()
    left, right = figure.subfigs
    assert [axes.get_ylabel() for axes in (*left.axes[::3], *right.axes[::3])] == ["a", "b", "c", ""]
    assert right.axes[1].get_xlabel() == "0% left"
    assert [axes.axison for axes in right.axes] == [True] * 3 + [False] * 3
