"""The command `vitprune play`."""

from vitprune_env.cli.play.command import Args, main

__all__ = ["Args", "main"]
