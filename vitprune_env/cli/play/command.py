"""A page on this machine to play with: a picture, a policy, a budget, and what becomes of the tokens.

    vitprune play                                           # the built-in network, baselines, runs/mappo if it is there
    vitprune play --checkpoint runs/mappo runs/other --policy evit tome
    vitprune play --policy my_policy.py:KeepLoud            # your own joins
    vitprune play --data-dir DIR --model deit_small_patch16_224 --weights FILE     # your images, your network

Policies are calibrated to the budget of the slider on training images; the pictures are held-out ones. Needs Gradio
(`pip install vitprune_env[play]`). Only browsers of this machine reach the page, and it reaches nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from vitprune_env.cli.flags import DeviceFlags, ImageFlags, read_flags

BASELINES = ("evit", "tome_share", "dpc", "random")


@dataclass(frozen=True)
class Args:
    """What to play with."""

    checkpoint: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR ...")] = ()
    """Output folders of training runs, or policy files; none: runs/mappo, if it is there."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = BASELINES
    """Baselines by name (`vitprune info` lists them), or your own as FILE.py:NAME or module:NAME."""
    images: int = 16
    """Pictures to choose from."""
    tune_images: int | None = None
    """Training images to calibrate on; None: 64 scenes, 16 image files."""
    timed_images: int | None = None
    """Copies of a picture timed at once; None: 16 scenes, 1 image file."""
    port: int | None = None
    """On 127.0.0.1; None: the first free one from 7860."""
    browser: bool = True
    """Open a browser."""
    seed: int = 0
    """Seed of everything random."""
    machine: DeviceFlags = field(default_factory=DeviceFlags)
    source: ImageFlags = field(default_factory=ImageFlags)


def main(argv: Sequence[str] | None = None) -> None:
    """Open everything, then show the page until Ctrl-C."""
    args = read_flags(Args, argv, __doc__, "vitprune play")
    from vitprune_env.cli.play.opening import session_of
    from vitprune_env.playground.page import gradio, serve

    gradio()  # says at once if it is missing
    args.machine.check_device()
    args.machine.set_threads(built_in=not args.source.reads_files)
    page = serve(session_of(args), args.port, args.browser)
    print(f"the page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
