"""That the fuzz tests try enough inputs, all of them against the clock."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

import fuzzing


def test_the_suite_tries_two_thousand_inputs_and_the_slow_tests_twenty_thousand() -> None:
    """`@inputs(count * times)`, where `times` is 1, or 10 if slow."""
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    counts = [int(count) for text in sources for count in re.findall(r"^ +@inputs\((\d+) \* times\)$", text, re.M)]
    assert sum(counts) >= 2000
    assert sum(len(re.findall(r"^@TIMES$", text, re.M)) for text in sources) == len(counts)


def test_what_hangs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.01)
    with pytest.raises(pytest.fail.Exception, match=r"took more than 0\.01 s"):
        fuzzing.attempt(lambda: time.sleep(5))
