"""`python`, by the server named in WARM_SOCKET (see server.py); where that is empty, or the server
refuses, an ordinary one. Starts in milliseconds: the standard library only, and little of it."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    path = os.environ.get("WARM_SOCKET")
    if path:
        # Until there is somebody to tell.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.connect(path)
            files = [number for number in open_files() if number != server.fileno()]
            message = {
                "arguments": sys.argv[1:],
                "cwd": os.getcwd(),
                "environment": dict(os.environ),
                "ignored_signals": ignored,
                "blocked_signals": sorted(blocked),
                "files": files,
            }
            socket.send_fds(server, [json.dumps(message).encode()], files)
            if pid := receive_number(server):
                follow(pid, server)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def open_files() -> list[int]:
    """Numbers of the files that this process was given."""
    numbers = map(int, os.listdir("/proc/self/fd"))
    return sorted(number for number in numbers if os.path.exists(f"/proc/self/fd/{number}"))


def follow(pid: int, server: socket.socket) -> None:
    """Hand signals on; end as the program ends. Is called `warm PID` meanwhile."""
    with open("/proc/self/comm", "w") as name:
        name.write(f"warm {pid}")
    for number in FORWARDED:  # what is ignored here, the program ignores until it decides otherwise
        signal.signal(number, lambda number, _: hand_on(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = os.waitstatus_to_exitcode(receive_number(server))
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive_number(server: socket.socket) -> int:
    answer = server.recv(64)
    if not answer:
        sys.exit("warm: the server has ended; its output is in server.log beside its socket.")
    return int(answer)


def hand_on(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended, and its status is on its way
        return


main()
