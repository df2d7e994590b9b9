"""A signal ends the job, at whatever moment it comes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Python ignores exceptions in both of these places, so the first StopSignal is lost there.
IN_A_DESTRUCTOR = """
class Dying:
    def __del__(self):
        os.kill(os.getpid(), NUMBER)
        time.sleep(0.01)
Dying()
"""
IN_A_FORK_HOOK = """
def hook():
    os.kill(os.getpid(), NUMBER)
    time.sleep(0.01)
os.register_at_fork(before=hook)
if os.fork() == 0:
    os._exit(0)
"""
ANYWHERE_ELSE = "os.kill(os.getpid(), NUMBER)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", [IN_A_DESTRUCTOR, IN_A_FORK_HOOK, ANYWHERE_ELSE])
def test_a_stop_is_not_lost(moment: str, number: signal.Signals) -> None:
    script = f"""
import os, signal, time
from job.stopping import StopSignal, acknowledge_stop, raise_on_stop_signals
NUMBER = {int(number)}
raise_on_stop_signals(lambda name: print("then", name, flush=True))
try:
{"".join(f"    {line}{chr(10)}" for line in moment.splitlines())}
    time.sleep(60)
except StopSignal as stop:
    acknowledge_stop()
    time.sleep(2.5)  # no reminder comes any more
    print("stopped by", stop)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (ended.returncode, ended.stdout) == (0, f"stopped by {number.name}\n"), ended.stderr
    assert ended.stderr == ""  # no traceback of an exception that Python dropped


def test_a_second_signal_ends_at_once() -> None:
    script = """
import os, signal, time
from job.stopping import StopSignal, raise_on_stop_signals
raise_on_stop_signals(lambda name: print("then", name, flush=True))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except StopSignal:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (75, "then SIGTERM\n")


def test_patience_lets_things_be_done_first() -> None:
    script = """
import os, signal, time
from job.stopping import StopSignal, acknowledge_stop, be_patient, raise_on_stop_signals
raise_on_stop_signals(lambda name: None)
be_patient(1.5)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
print("done")
try:
    time.sleep(60)
except StopSignal as stop:
    acknowledge_stop()
    print("stopped by", stop)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (0, "done\nstopped by SIGTERM\n"), ended.stderr


def test_a_stop_that_was_granted_time_comes_back() -> None:
    script = """
import os, signal, time
from job.stopping import StopSignal, acknowledge_stop, raise_on_stop_signals, stop_in
raise_on_stop_signals(lambda name: None)
try:
    os.kill(os.getpid(), signal.SIGTERM)
except StopSignal:
    acknowledge_stop()
stop_in(2.5)
time.sleep(1)
print("done")
try:
    time.sleep(60)
except StopSignal as stop:
    acknowledge_stop()
    print("stopped by", stop)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (0, "done\nstopped by SIGTERM\n"), ended.stderr
