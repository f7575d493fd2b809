"""The `slora` command."""

from slora.cli.command_line import main

__all__ = ["main"]
