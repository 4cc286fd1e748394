"""Answers as pictures and HTML: the board to click on, a panel per site, classes with their logits, numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from vitprune_env.playground.pictures import Picture
from vitprune_env.playground.session import Answer, Question, Times
from vitprune_env.plots.render import Scene, class_name, shade, site_title, tint

BOARD_PIXELS = 480  # smallest height of the board
THUMBNAIL = 120  # smallest height of a picture to choose from
LINE, GREY, THICK = 0.5, 150, 2  # weight, brightness and width in pixels of the lines between patches
WIDE, NARROW, FEW = 194, 146, 4  # widths of the panels of the sites, in pixels; the first for so many at most
TOP = 5  # classes of each network that are listed


def board(picture: Picture, gone: Iterable[int], grid_size: tuple[int, int]) -> np.ndarray:
    """The picture with lines between the patches, those that were clicked away covered.

    Args:
        picture: the picture.
        gone: numbers of the tokens that were clicked away.
        grid_size: rows and columns of patches.

    Returns:
        `[H', W', 3]` uint8, enlarged to a size at which patches can be hit.
    """
    rows, columns = grid_size
    before = np.ones(rows * columns, dtype=bool)
    after = before.copy()
    after[list(gone)] = False
    out = enlarged(shade(picture.rgb, before, after, grid_size), BOARD_PIXELS)
    height, width, _ = out.shape
    for start, stop in ((row * height // rows, row * height // rows + THICK) for row in range(1, rows)):
        out[start:stop] = (1 - LINE) * out[start:stop] + LINE * GREY
    for start, stop in ((column * width // columns, column * width // columns + THICK) for column in range(1, columns)):
        out[:, start:stop] = (1 - LINE) * out[:, start:stop] + LINE * GREY
    return out


def enlarged(pixels: np.ndarray, height: int) -> np.ndarray:
    """An image `[H, W, 3]` in 0..1 as `[H', W', 3]` uint8 of at least this height, each pixel a square."""
    factor = max(1, -(-height // len(pixels)))
    return (pixels * 255).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)


def png(pixels: np.ndarray) -> str:
    """An image `[H, W, 3]` in 0..1 as the address of an image inside a page."""
    stream = io.BytesIO()
    Image.fromarray(enlarged(pixels, 1)).save(stream, "png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def sites(picture: Picture, answer: Answer, grid_size: tuple[int, int]) -> str:
    """One panel per site with the tokens that go on, as HTML; where tokens merged, one more that shows which did."""
    scene = Scene(picture.rgb, answer.keep, grid_size, answer.sites)
    kept = [f"{alive.sum()} of {alive.size}" for alive in answer.keep]
    captions = [(site_title(site), left) for site, left in zip(answer.sites, kept, strict=True)]
    panels = list(zip(captions, scene.panels()[1:], strict=True))
    merged = answer.source[answer.source >= 0]
    if len(np.unique(merged)) < len(merged):
        panels.append((("at the end", "colour: merged"), tint(picture.rgb, answer.source, grid_size)))
    figures = (
        f'<figure><img src="{png(pixels)}" alt="tokens {escape(where)}">'
        f"<figcaption><b>{escape(where)}</b><span>{escape(left)}</span></figcaption></figure>"
        for (where, left), pixels in panels
    )
    size = WIDE if len(panels) <= FEW else NARROW
    return f'<div class="vp-sites" style="--panel: {size}px">{"".join(figures)}</div>'


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities `[C]` of logits `[C]`."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def classes(answer: Answer, label: int | None = None, names: Sequence[str] | None = None) -> str:
    """The most probable classes of dense and pruned network with probabilities and logits, as an HTML table."""
    chances = np.stack([softmax(answer.dense_logits), softmax(answer.logits)])
    listed = np.argsort(-chances.max(axis=0), kind="stable")[:TOP]
    lines = []
    for number in listed.tolist():
        cells = "".join(
            f'<td class="vp-bar vp-{kind}"><i style="width:{100 * chance[number]:.1f}%"></i>'
            f"<b>{100 * chance[number]:.1f} %</b></td><td>{logits[number]:.2f}</td>"
            for kind, chance, logits in zip(
                ("dense", "pruned"), chances, (answer.dense_logits, answer.logits), strict=True
            )
        )
        mark = ' <em title="the true class">true</em>' if number == label else ""
        lines.append(f"<tr><th>{escape(class_name(number, names))}{mark}</th>{cells}</tr>")
    head = "<tr><th>class</th><th>dense</th><th>logit</th><th>pruned</th><th>logit</th></tr>"
    return f'<table class="vp-classes"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'


def numbers(question: Question, answer: Answer, times: Times | None, names: Sequence[str] | None = None) -> str:
    """What is read, cost and time as HTML; times None: they are being measured."""
    dense, pruned = (class_name(int(logits.argmax()), names) for logits in (answer.dense_logits, answer.logits))
    same = "as the dense network does" if dense == pruned else f"the dense network reads {dense}"
    left = int(answer.keep[-1].sum())
    kept = "1 token" if left == 1 else f"{left} tokens"
    cost = f"{answer.macs / 1e9:.4g} of {answer.dense_macs / 1e9:.4g} GMACs"
    own = f"{100 * answer.policy_macs / answer.dense_macs:.1f} % for the policy itself"
    took, dense_took, how = "...", "being measured", ""
    if times is not None:
        took, dense_took = (
            f"{times.pruned_ms:.3g} ms",
            f"dense {times.dense_ms:.3g} ms: {times.dense_ms / times.pruned_ms:.2f}x as fast",
        )
        batch = "one image" if times.images == 1 else f"batch of {times.images}"
        how = f"medians of {times.pairs} runs, {batch}"
    cards = (
        ("reads", escape(pruned), escape(same), ""),
        ("costs", f"{100 * answer.share:.1f} % of dense", cost, own),
        ("keeps", kept, f"of {len(answer.source)} after the last site", f"{len(question.gone)} clicked away"),
        ("takes", took, dense_took, how),
    )
    return _cards(cards)


def _cards(cards: Iterable[tuple[str, str, str, str]]) -> str:
    """A grid of cards with a word, a value and two lines of small print each."""
    parts = (
        f'<div id="vp-{word}"><span>{word}</span><b>{value}</b><small>{first}</small><small>{second}</small></div>'
        for word, value, first, second in cards
    )
    return f'<div class="vp-cards">{"".join(parts)}</div>'


def note(text: str) -> str:
    """A sentence in place of an answer, as HTML."""
    return f'<div class="vp-note">{escape(text)}</div>'


STYLE = """
#head h1 {font-size: 24px; margin: 0 0 4px}
#head p, #legend {margin: 0; opacity: .75}
#legend {margin-bottom: -8px}
#pictures .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important; gap: 6px; padding: 0}
#pictures :is(.gallery-container, .grid-wrap) {height: auto !important; min-height: 0 !important}
#pictures .thumbnail-item {width: 100%; height: auto; min-height: 0; aspect-ratio: 1}
#board img {cursor: crosshair}
.vp-sites {display: flex; flex-wrap: wrap; gap: 16px}
.vp-sites figure {margin: 0; width: var(--panel)}
.vp-sites img {width: 100%; margin: 0; border-radius: 6px; image-rendering: pixelated}
.vp-sites figcaption {display: flex; justify-content: space-between; font-size: 13px; margin-top: 4px}
.vp-sites figcaption span {opacity: .7}
.vp-classes {width: 100%; margin: 0; border: 0 !important; border-collapse: collapse; font-size: 14px;
  font-variant-numeric: tabular-nums}
.vp-classes :is(tr, th, td) {border: 0 !important}
.vp-classes :is(th, td) {padding: 6px 8px; text-align: left}
.vp-classes thead th {font-size: 12px; font-weight: 500; opacity: .7}
.vp-classes tbody th {font-weight: 600; max-width: 180px}
.vp-classes tbody tr {border-top: 1px solid var(--border-color-primary) !important}
.vp-classes em {font-size: 11px; font-style: normal; padding: 1px 7px; border-radius: 9px; background: #d9efdf;
  color: #14532d}
.vp-bar {position: relative; width: 28%}
.vp-bar i {position: absolute; left: 0; top: 4px; bottom: 4px; border-radius: 3px; min-width: 2px}
.vp-bar b {position: relative; font-weight: 500}
.vp-dense i {background: #cfd5de}
.vp-pruned i {background: #f9bd6b}
.vp-cards {display: grid; grid-template-columns: repeat(2, 1fr); gap: 10px}
.vp-cards > div {display: flex; flex-direction: column; padding: 10px 14px; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill)}
.vp-cards span {font-size: 12px; opacity: .7}
.vp-cards b {font-size: 20px; line-height: 1.4; font-weight: 650}
.vp-cards small {font-size: 12px; opacity: .75; line-height: 1.4; min-height: 17px}
.vp-note {border-left: 4px solid #f0a030; padding: 10px 14px; border-radius: 4px;
  background: var(--background-fill-secondary)}
.dark .vp-bar i {opacity: .45}
"""
