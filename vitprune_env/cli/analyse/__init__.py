"""The command `vitprune analyse`."""

from vitprune_env.cli.analyse.command import Args, main

__all__ = ["Args", "main"]
