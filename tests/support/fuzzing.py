"""What all fuzz tests share: how many inputs, a limit of time for each, and what counts as a refusal."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

T = TypeVar("T")
SECONDS = 30  # that one input may take on a busy machine; usual are milliseconds
TIMES = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])  # of the inputs in the suite
SENTENCE = re.compile(r"[\w.\[\]' ,]+: (expected|token|unknown|the|a )")
ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 0.5, -0.5, 1.5, 10**30, -(2**63), 2**63, 1e-300, 1e300),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        False,
        None,
        "",
        "x",
        "3",
        b"x",
        (),
        [],
        (1,),
        [0.5],
        {},
        object,
    ),
)
odd = st.sampled_from(ODD)


def inputs(count: int) -> Callable[[T], T]:
    """Run a hypothesis test on so many inputs, the same ones every time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def in_time() -> Iterator[None]:
    """Fail where the block hangs."""

    def fail(*_: Any) -> None:
        pytest.fail(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(call: Callable[[], T]) -> T | None:
    """The result of a call; None where it was refused by an error that names what was wrong, in one line."""
    try:
        with in_time():
            return call()
    except (ValueError, TypeError, IndexError) as error:
        refusal = error
    said = str(refusal)
    if not type(refusal).__module__.startswith("vitprune_env") and not SENTENCE.match(said):
        raise refusal
    assert "\n" not in said, said
    return None
