"""The page itself, with Gradio: what stands where, and what happens when something is touched."""

from __future__ import annotations

import os
from threading import Thread
from typing import Any

from PIL import Image

from vitprune_env.errors import MissingPackageError, SettingsError, VitPruneError
from vitprune_env.playground import panels
from vitprune_env.playground.clicks import token_at
from vitprune_env.playground.pictures import from_image
from vitprune_env.playground.session import Question, Session

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Arial", "sans-serif")  # those of the machine
MONO = ("ui-monospace", "Consolas", "monospace")
FIRST_SHARE, LOWEST, STEP = 0.5, 0.1, 0.05  # of the slider
AHEAD = (0.5, 0.35, 0.7, 0.25)  # budgets that policies are calibrated to before anybody asks
HEAD = """<h1>What does the network need to see?</h1>
<p>Every patch of a picture is a token. A policy drops or merges tokens inside the network, as many as the budget asks
for. Click on patches to take them away yourself.</p>"""
LEGEND = """<b>After each site</b> &ensp; orange: leaves here &ensp; white: left before"""


def gradio() -> Any:
    """The library, told to report nothing to anybody.

    Raises:
        MissingPackageError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # pyright: ignore[reportMissingImports], it is optional
    except ImportError as error:
        raise MissingPackageError(f"vitprune play needs Gradio: pip install vitprune_env[play] ({error})") from error
    return gradio


def build(session: Session) -> Any:
    """The page of a session, as Gradio's `Blocks`.

    Raises:
        MissingPackageError: if Gradio is not installed.
    """
    gr = gradio()
    grid, names, policies = session.backbone.grid_size, session.class_names, session.policies

    def thumbnails() -> list[tuple[Any, None]]:
        return [(panels.enlarged(picture.rgb, panels.THUMBNAIL), None) for picture in session.pictures]

    latest: dict[str, Question] = {}  # by the browser's session; answers to older questions come too late

    def show(number: int, policy: str, share: float, gone: list[int], request: Any) -> tuple[Any, ...]:
        """Board, classes, numbers without time, and panels of the sites."""
        question, picture = Question(number, policy, share, frozenset(gone)), session.pictures[number]
        latest[request.session_hash] = question
        board = panels.board(picture, gone, grid)
        try:
            answer = session.answer(question)
        except VitPruneError as error:
            parts = board, panels.note(str(error)), "", ""
        else:
            classes = panels.classes(answer, picture.label, names)
            parts = board, classes, panels.numbers(question, answer, None, names), panels.sites(picture, answer, grid)
        return parts if latest[request.session_hash] == question else tuple(gr.skip() for _ in parts)

    def measure(number: int, policy: str, share: float, gone: list[int], request: Any) -> Any:
        """The numbers with time, if they are still asked for."""
        question = Question(number, policy, share, frozenset(gone))
        if latest.get(request.session_hash) != question:
            return gr.skip()
        try:
            numbers = panels.numbers(question, session.answer(question), session.times(question), names)
        except VitPruneError:
            return gr.skip()
        return numbers if latest[request.session_hash] == question else gr.skip()

    # Gradio passes the request and the event to what is annotated with their classes.
    show.__annotations__["request"] = measure.__annotations__["request"] = gr.Request

    def toggle(number: int, gone: list[int], event: Any) -> list[int]:
        (x, y), shown = event.index, panels.board(session.pictures[number], (), grid)
        return sorted(set(gone) ^ {token_at(x, y, (len(shown), len(shown[0])), grid)})

    def choose(event: Any) -> tuple[int, list[int]]:
        return event.index, []

    toggle.__annotations__["event"] = choose.__annotations__["event"] = gr.SelectData

    def bring(path: str) -> tuple[Any, int, list[int]]:
        try:
            with Image.open(path) as image:
                number = session.add(from_image(session.backbone, image))
        except (OSError, ValueError, SyntaxError) as error:
            raise gr.Error(f"This file is no image that can be read: {error}") from error
        return gr.Gallery(thumbnails(), selected_index=number), number, []

    with gr.Blocks(title="vitprune play", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        number, gone = gr.State(0), gr.State([])
        gr.HTML(HEAD, elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                policy = gr.Dropdown(list(policies), value=policies[0], label="Policy", elem_id="policy")
                share = gr.Slider(
                    LOWEST, 1.0, FIRST_SHARE, step=STEP, label="Budget", buttons=[], elem_id="share",
                    info="share of the dense MACs, mean over images",
                )  # fmt: skip
                gallery = gr.Gallery(
                    thumbnails(), show_label=False, columns=4, allow_preview=False, selected_index=0, interactive=False,
                    buttons=[], elem_id="pictures",
                )  # fmt: skip
                upload = gr.UploadButton("Bring a picture", file_types=["image"], size="sm", elem_id="upload")
            with gr.Column(scale=9, min_width=600):
                with gr.Row():
                    with gr.Column(scale=4, min_width=300):
                        board = gr.Image(
                            show_label=False, interactive=False, format="png", buttons=[], type="numpy", elem_id="board"
                        )
                        back = gr.Button("Put all patches back", size="sm", elem_id="back")
                    with gr.Column(scale=5, min_width=300):
                        numbers = gr.HTML(elem_id="numbers")
                        classes = gr.HTML(elem_id="classes")
                gr.HTML(LEGEND, elem_id="legend")
                sites = gr.HTML(elem_id="sites")
        inputs, shown = [number, policy, share, gone], [board, classes, numbers, sites]
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        chosen = gallery.select(choose, None, [number, gone], **quiet)
        brought = upload.upload(bring, upload, [gallery, number, gone])
        clicked = board.select(toggle, [number, gone], gone, **quiet)
        restored = back.click(list, None, gone, **quiet)
        for event in (
            page.load,
            policy.change,
            share.change,
            *(done.then for done in (chosen, brought, clicked, restored)),
        ):
            event(show, inputs, shown, **quiet).then(measure, inputs, numbers, **quiet)
    return page


def serve(session: Session, port: int | None = None, browser: bool = True) -> Any:
    """Start to show the page to browsers of this machine, and calibrate ahead meanwhile.

    Args:
        session: what the page shows.
        port: where; None: the first free one from 7860.
        browser: whether to open a browser.

    Returns:
        Gradio's `Blocks`: `local_url` is the address, `block_thread()` waits for Ctrl-C, `close()` ends the server.

    Raises:
        MissingPackageError: if Gradio is not installed.
        SettingsError: for a port that is in use.
    """
    gr, page = gradio(), build(session)
    Thread(target=session.calibrate_ahead, args=(AHEAD,)).start()
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser, prevent_thread_lock=True,
            footer_links=[], css=panels.STYLE, quiet=True, enable_monitoring=False, ssr_mode=False, run_history=False,
            theme=gr.themes.Default(primary_hue="orange", neutral_hue="slate", font=FONTS, font_mono=MONO),
        )  # fmt: skip
    except OSError as error:
        raise SettingsError(f"port: expected a free one, got {port} ({error})") from error
    return page
