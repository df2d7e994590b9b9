"""Containers of the image as a careful cluster runs them: without root, capabilities or a root that can be written."""

import os
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import pytest

DOCKER = os.environ.get("DOCKER", "docker")
TIMEOUT_S = 300
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host"]


def call_docker(*arguments: str, environment: Mapping[str, str] | None = None, input_text: str = "") -> str:
    """Run a docker command that must succeed and return what it said."""
    done = subprocess.run(
        [DOCKER, *arguments],
        env=os.environ | (environment or {}),
        input=input_text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_inside(image: str, program: str, *arguments: str, input_text: str = "") -> str:
    """Run another program than the job in a container of the image, as the image's user, and return what it said."""
    options = ["--rm", "--interactive", *HARDENED, "--entrypoint", program]
    return call_docker("run", *options, image, *arguments, input_text=input_text)


class Container:
    """A container that runs the job; it and its volumes go away with the `with` block."""

    def __init__(
        self, image: str, *arguments: str, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> None:
        self.name = f"sft-job-test-{secrets.token_hex(6)}"
        variables = {"SFT_RUNTIME__LOG_FORMAT": "text"} | dict(environment or {})  # the tests read it
        names = [word for name in variables for word in ("--env", name)]  # their values are in no command line
        command = ["run", "--detach", "--name", self.name, *HARDENED, *names, *options, image, *arguments]
        call_docker(*command, environment=variables)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call_docker("rm", "--force", "--volumes", self.name)

    def wait(self) -> int:
        """Wait until it ends and return its exit code."""
        return int(call_docker("wait", self.name))

    def output(self) -> str:
        """Return all that the job has said."""
        return call_docker("logs", self.name)

    def wait_for(self, text: str) -> None:
        """Wait until the job has said this."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while text not in (output := self.output()):
            if not self.is_running() or time.monotonic() > deadline_s:
                pytest.fail(f"never said {text!r}: {output}")
            time.sleep(0.5)

    def is_running(self) -> bool:
        """Say whether it has not ended."""
        return call_docker("inspect", "--format", "{{.State.Running}}", self.name).strip() == "true"

    def processes(self) -> dict[int, str]:
        """Return the id, on this machine, and the command line of each of its processes."""
        lines = call_docker("top", self.name, "-o", "pid,args").splitlines()[1:]
        return {int(pid): command for pid, command in (line.split(maxsplit=1) for line in lines)}
