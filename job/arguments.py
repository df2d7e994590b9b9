"""The command line: one word, since all but what a check is to assume is set by variables."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Command:
    """What is to be done: run, check or schema. `gpus`: how many to check for, and the GiB of each; None: this
    machine's."""

    name: str
    gpus: tuple[int, int] | None


def parse_command(arguments: Sequence[str] | None) -> Command:
    """Return the command that was given. Ends the process for a wrong one, and for --help."""
    parser = _Parser(prog="sft-job", description="Fine-tune a language model with LoRA, as the SFT_* variables say.")
    parser.add_argument("--version", action="version", version=f"sft-job {job.__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "check", "schema"),
        help="run (the default), check without training, or print the settings' JSON Schema",
    )
    parser.add_argument(
        "--gpus",
        type=_parse_gpus,
        metavar="COUNTxGIB",
        help="check for a machine with these GPUs, such as 8x80 for eight of 80 GiB; 0x0 for one without",
    )
    given = parser.parse_args(arguments)
    if given.gpus is not None and given.command != "check":
        parser.error(f"--gpus is for check: {given.command} takes the GPUs that it finds")
    return Command(given.command, given.gpus)


def _parse_gpus(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not COUNTxGIB, such as 8x80")
    return int(found[1]), int(found[2])
