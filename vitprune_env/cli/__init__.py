"""The command `vitprune`: one file per subcommand, each of which imports what it needs when it runs."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

COMMANDS = {
    "train": "train a token policy for a budget, and compare it with what it has to beat",
    "reward-ratio": "train with RL4EViT's reward at several ratios of its weights, and draw how much is kept",
    "evaluate": "measure a trained policy, or a method of the papers, on held-out images",
    "analyse": "show what a policy does image by image, layer by layer and patch by patch",
    "benchmark": "compare policies at equal cost: tables, intervals, figures",
    "finetune": "fine-tune a network for a policy that prunes it",
    "finetune-backbone": "make a network that bears missing tokens, from pretrained weights and class folders",
    "speedup": "time dense and pruned model side by side",
    "play": "open a page to play with: a picture, a policy, a budget, and clicks on tokens",
    "export": "write a pruned model as a folder, a torch program or an ONNX file",
    "info": "show versions, networks, baselines, or what a saved policy is",
    "oracle": "show what knowing where the digit is would be worth on the built-in tasks",
    "digits-folder": "write a built-in task as a folder of PNG images",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: command line without the program's name; None: that of the process.

    Raises:
        SystemExit: with code 2 for what was asked for wrongly, after one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        _fail(f"unknown command {name!r}; {hint}")
    from vitprune_env.cli.flags.known import misspelt

    if (mistake := misspelt(name, rest)) is not None:
        _fail(mistake)
    module = import_module(f"vitprune_env.cli.{name.replace('-', '_')}")
    with explained(module.Args):
        module.main(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return f"""usage: vitprune COMMAND [FLAGS]

Token pruning of Vision Transformers as a multi-agent game.

{commands}

`vitprune COMMAND --help` explains the flags of a command."""


@contextmanager
def explained(flags: type | None = None) -> Iterator[None]:
    """Turn an error about what was asked for into one line on stderr and exit code 2, without a traceback.

    Warnings of this package become a line on stderr each.

    Args:
        flags: the dataclass of the command's flags, which errors and warnings then name where the library names
            arguments; None: they are said as they are.
    """
    from vitprune_env.errors import VitPruneError

    log, shown = logging.getLogger("vitprune_env"), _OnStderr(flags)
    log.addHandler(shown)
    try:
        yield
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is what is left written at the exit
        raise SystemExit(1) from None
    except (VitPruneError, ConnectionError) as error:
        _fail(_in_flags(str(error), flags))
    except (ValueError, TypeError) as error:
        if re.match(r"\w[\w.\[\]]*: expected", str(error)):  # the sentence that all checks of arguments speak
            _fail(_in_flags(str(error), flags))
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            _fail(f"out of memory; fewer or smaller images need less ({str(error).partition(chr(10))[0]})")
        raise
    finally:
        log.removeHandler(shown)


class _OnStderr(logging.Handler):
    """Prints each record as one line that names these flags."""

    def __init__(self, flags: type | None) -> None:
        super().__init__(logging.WARNING)
        self.flags = flags

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {_in_flags(record.getMessage(), self.flags)}", file=sys.stderr)


def _in_flags(message: str, flags: type | None) -> str:
    from vitprune_env.cli.flags import in_flags

    return message if flags is None else in_flags(message, flags)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
