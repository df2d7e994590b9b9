"""The command line: one word, and the slots to look at where that is what it does. All else is set by variables, but
for what a check is to assume."""

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

# How many URIs a command takes, at least and at most (None: any number); others take none.
_URIS: dict[str, tuple[int, int | None]] = {"verify": (1, 1)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with the code for wrong settings, where argparse would end with 2."""
        hint = "`sft-job --help` lists the commands; all else is set by SFT_* variables"
        write_outcome(load_runtime_settings(), format_outcome(CONFIG, message, hint, Progress()))
        self.print_usage(sys.stderr)
        self.exit(CONFIG.code, f"{self.prog}: {message}\nremedy: {hint}\n")


@dataclass(frozen=True)
class Command:
    """What is to be done: run, check, schema, or something with the published slots that `uris` name. `gpus`: how many
    to check for, and the GiB of each; None: this machine's."""

    name: str
    gpus: tuple[int, int] | None
    uris: tuple[str, ...] = ()


def parse_command(arguments: Sequence[str] | None) -> Command:
    """Return the command that was given. Ends the process for a wrong one, and for --help."""
    parser = _Parser(prog="sft-job", description="Fine-tune a language model with LoRA, as the SFT_* variables say.")
    parser.add_argument("--version", action="version", version=f"sft-job {job.__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "check", "schema", "verify"),
        help="run (the default), check without training, print the settings' JSON Schema, or verify a published slot",
    )
    parser.add_argument("uris", nargs="*", metavar="URI", help="what to verify: s3://..., hf://org/name, or a folder")
    parser.add_argument(
        "--gpus",
        type=_parse_gpus,
        metavar="COUNTxGIB",
        help="check for a machine with these GPUs, such as 8x80 for eight of 80 GiB; 0x0 for one without",
    )
    given = parser.parse_args(arguments)
    if given.gpus is not None and given.command != "check":
        parser.error(f"--gpus is for check: {given.command} takes the GPUs that it finds")
    _check_uris(parser, given.command, given.uris)
    return Command(given.command, given.gpus, tuple(given.uris))


def _check_uris(parser: _Parser, command: str, uris: Sequence[str]) -> None:
    least, most = _URIS.get(command, (0, 0))
    if len(uris) < least:
        parser.error(f"{command} needs {least} URI{'s' * (least > 1)} of published slots, and {len(uris)} are given")
    if most is not None and len(uris) > most:
        parser.error(f"{command} takes {most or 'no'} URI{'s' * (most != 1)}, and {len(uris)} are given")


def _parse_gpus(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not COUNTxGIB, such as 8x80")
    return int(found[1]), int(found[2])
