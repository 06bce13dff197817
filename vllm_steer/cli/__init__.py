"""The ``vllm-steer`` command, with one module per subcommand."""

from vllm_steer.cli.command import command_line, main

__all__ = ["command_line", "main"]
