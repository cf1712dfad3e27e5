"""The client of `warm_programs.py`: hands over what a start was given, and ends as the fork ends.

It imports little, because it starts as often as what it stands for. As a script: `SOCKET ARGUMENTS...`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(address: str, arguments: list[str]) -> None:
    """Have a fork run, and end as it ends."""
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "ignored": [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN],
        "cores": sorted(os.sched_getaffinity(0)),
    }
    data = json.dumps(asked).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    length = f"{len(data):8}".encode()
    connection.sendmsg([length], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    connection.sendall(data)
    child = int(connection.recv(8, socket.MSG_WAITALL))
    for number in PASSED_ON:
        if int(number) not in asked["ignored"]:
            signal.signal(number, lambda number, _: os.kill(child, number))
    status = int(connection.recv(8, socket.MSG_WAITALL))
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
