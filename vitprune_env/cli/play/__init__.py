"""The command `vitprune play`."""

from vitprune_env.cli.play.command import main

__all__ = ["main"]
