"""`python in_terminal.py COLUMNS COMMAND...` runs a command on a terminal of its own, so wide, and copies what it shows
to stdout. SIGTERM is passed on."""

import os
import pty
import signal
import subprocess
import sys
import termios


def main(columns: int, command: list[str]) -> int:
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "NO_COLOR": "1"}
    )
    os.close(theirs)
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    while True:
        try:
            shown = os.read(mine, 65_536)
        except OSError:  # EIO: the last of those who held the terminal has ended
            return process.wait()
        os.write(sys.stdout.fileno(), shown)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
