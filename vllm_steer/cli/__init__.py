"""The ``vllm-steer`` command, a module for each of its commands."""

from vllm_steer.cli.command import command_line, main

__all__ = ["command_line", "main"]
