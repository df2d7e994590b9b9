"""The command line: one word, since all else is set by variables."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import job
from job.errors import CONFIG
from job.outcome import Progress, format_outcome, write_outcome
from job.settings import load_runtime_settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with the code for wrong settings, where argparse would end with 2."""
        hint = "`sft-job --help` lists the commands; all else is set by SFT_* variables"
        write_outcome(load_runtime_settings(), format_outcome(CONFIG, message, hint, Progress()))
        self.print_usage(sys.stderr)
        self.exit(CONFIG.code, f"{self.prog}: {message}\nremedy: {hint}\n")


def parse_command(arguments: Sequence[str] | None) -> str:
    """Return which command was given: run, check or schema. Ends the process for any other word, and for --help."""
    parser = _Parser(prog="sft-job", description="Fine-tune a language model with LoRA, as the SFT_* variables say.")
    parser.add_argument("--version", action="version", version=f"sft-job {job.__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "check", "schema"),
        help="run (the default), check without training, or print the settings' JSON Schema",
    )
    command: str = parser.parse_args(arguments).command
    return command
