"""A Python that has imported everything, and forks for each program that asks.

Torch, Megatron, vLLM and Transformers take 20 s of a core to import, and the slow tests start
hundreds of processes. `client.py` stands in for `python`: it sends its command line, environment
and open files here and ends as the program ends.

    server.py SOCKET     ends when its standard input does

A client gets the process id of its program, then its wait status; or 0 when the program wants
another PYTHONPATH or number of threads than this process has, and must be started afresh. When a
client is gone (killed, say), its program is killed with its descendants.
"""

import atexit
import fcntl
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import psutil

ROOT = Path(__file__).parents[2]
STANDARD_INPUT = 0
REFUSED = 0
MAX_MESSAGE_BYTES, MAX_FILES = 128 << 10, 250
OPTIONS = {"-u", "-B"}  # of `python`, that are known here
FIXED = ("PYTHONPATH", "OMP_NUM_THREADS")  # take effect at the start of a process


@dataclass
class Program:
    """Program that a client wants to run."""

    arguments: list[str]  # of `python`
    cwd: str
    environment: dict[str, str]
    ignored_signals: list[int]
    blocked_signals: list[int]
    files: list[int]  # as the client numbers them
    received: list[int] = field(default_factory=list)  # the same as numbered here


def main(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(128)  # clients wait while this process imports
    import_everything()
    program = Server(listener).serve()
    if program is not None:  # in the child
        run(program)
    shutil.rmtree(Path(path).parent)


def import_everything() -> None:
    without = []  # launch/test_newest.sh runs without them
    if importlib.util.find_spec("nvidia.dali") is None:
        without.append("megatron_vrl.video.dali")
    if importlib.util.find_spec("vllm") is None:
        without.append("megatron_vrl.rollout.vllm.")
    else:
        from megatron_vrl.rollout.vllm.startup import import_vllm

        import_vllm()
        for name in ("vllm.model_executor.models.qwen2_5_vl", "vllm.v1.worker.cpu_worker"):
            importlib.import_module(name)
    for module in pkgutil.walk_packages([str(ROOT / "megatron_vrl")], "megatron_vrl."):
        if not module.name.startswith(tuple(without)):
            importlib.import_module(module.name)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # they all are
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"warm: {threads} threads after the imports; a fork would lose them.")


class Server:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._running: dict[int, socket.socket] = {}  # a program's process id -> its client
        self._selector = selectors.DefaultSelector()
        self._watch(STANDARD_INPUT, "end")
        self._watch(listener, "client")

    def serve(self) -> Program | None:
        """None when standard input has ended; in a forked child, its program."""
        while True:
            for key, _ in self._selector.select():
                what, pid = key.data
                if what == "end":
                    for program_id in self._running:
                        kill_tree(program_id)
                    return None
                if what == "client":
                    if (program := self._start()) is not None:
                        return program
                elif what == "gone":
                    if pid in self._running:
                        self._selector.unregister(key.fileobj)
                        kill_tree(pid)
                else:
                    self._selector.unregister(key.fileobj)
                    os.close(key.fd)
                    self._reap(pid)

    def _start(self) -> Program | None:
        """Run the program in the child process."""
        client, _ = self._listener.accept()
        program = receive(client)
        if program is None:
            send(client, REFUSED)
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._close()
            client.close()
            return program
        for number in program.received:
            os.close(number)
        self._running[pid] = client
        self._watch(client, "gone", pid)
        self._watch(os.pidfd_open(pid), "ended", pid)
        send(client, pid)
        return None

    def _reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        client = self._running.pop(pid)
        send(client, status)
        if client in self._selector.get_map():
            self._selector.unregister(client)
        client.close()

    def _watch(self, file: Any, what: str, pid: int = 0) -> None:
        self._selector.register(file, selectors.EVENT_READ, (what, pid))

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            elif key.fd != STANDARD_INPUT:
                os.close(key.fd)
        self._selector.close()


def receive(client: socket.socket) -> Program | None:
    """None for what cannot run here."""
    data, received, _, _ = socket.recv_fds(client, MAX_MESSAGE_BYTES, MAX_FILES)
    if not data:
        return None
    program = Program(**json.loads(data), received=received)
    options, main = split(program.arguments)
    fixed = all(program.environment.get(name) == os.environ.get(name) for name in FIXED)
    if fixed and main and options <= OPTIONS:
        return program
    for number in received:
        os.close(number)
    return None


def split(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Options of `python`, and what comes after them."""
    for place, word in enumerate(arguments):
        if word in ("-m", "-c") or not word.startswith("-"):
            return set(arguments[:place]), arguments[place:]
    return set(arguments), []


def send(client: socket.socket, number: int) -> None:
    try:
        client.send(str(number).encode())
    except OSError:  # it has gone, which the next round sees
        return


def kill_tree(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        doomed = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in doomed:
        process.kill()


# In the child.


def run(program: Program) -> None:
    """Run as `python ARGUMENTS` would, but end at once: clearing a thousand modules takes 1 s."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in program.ignored_signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, program.blocked_signals)
    take(program.received, program.files)
    os.environ.clear()
    os.environ.update(program.environment)
    os.chdir(program.cwd)
    multiprocessing.set_executable(os.environ["PYTHON_EXEC"])
    try:
        run_main(program)
        code = 0
    except SystemExit as leaving:
        code = code_of(leaving)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # CPython's own; typeshed leaves it out
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code)


def take(received: list[int], numbers: list[int]) -> None:
    """Renumber open files; any may have the number of another."""
    above = max(received + numbers) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in received]
    for number in received:
        os.close(number)
    for from_, to in zip(moved, numbers, strict=True):
        os.dup2(from_, to)
        os.close(from_)


def run_main(program: Program) -> None:
    options, (kind, *rest) = split(program.arguments)
    unbuffered = "-u" in options or "PYTHONUNBUFFERED" in os.environ
    cast(TextIOWrapper, sys.stdout).reconfigure(write_through=unbuffered)
    sys.dont_write_bytecode |= "-B" in options
    if kind == "-m":
        sys.path[0], sys.argv = program.cwd, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def code_of(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main(sys.argv[1])
