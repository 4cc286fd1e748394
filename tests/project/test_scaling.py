"""The arithmetic of docs/scaling.md is what its code prints."""

from __future__ import annotations

import contextlib
import io
import re

from places import DOCS

PAGE = DOCS / "scaling.md"


def test_the_page_shows_what_its_code_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    code, shown = re.findall(r"```python\n(import torch.*?)```\n\n```text\n(.*?)```", text, re.S)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(PAGE), "exec"), {})
    assert printed.getvalue() == shown
