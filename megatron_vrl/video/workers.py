"""Processes that may be killed: where files are opened and decoded, so that none can stop a rank.

A decoder that hangs is killed after its time, one that crashes takes only its own process along;
both become a VideoError and the next task starts a new process. Processes come from a fork server
that has loaded torch and FFmpeg once, so a new one costs milliseconds and no thread of the trainer
is ever forked. Left out: shared memory; frames come back through a pipe, which costs a few percent
of decoding them.
"""

import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from megatron_vrl.errors import ConfigError, UserError, VideoError
from megatron_vrl.process.parent_death import deaf_to_interrupts, end_with_starter

START_S = 300.0  # a process that has not loaded its libraries by then never will
PRELOADED = ["megatron_vrl.video.pyav"]
# A socket's address holds 107 bytes; multiprocessing adds "/pymp-xxxxxxxx/listener-xxxxxxxx".
OWN_NAME = len("/pymp-") + 8
MAX_TMPDIR = 107 - OWN_NAME - len("/listener-") - 8
SHORT_TMPDIR = "/tmp"
_socket_lock = threading.Lock()


class Workers:
    """`num` processes, each of which calls `make` once and hands the result to every task.

    A task is a function that can be pickled by name: `task(made, *arguments)`. Processes end with
    this object, with their parent, or when they are killed.
    """

    def __init__(self, num: int, make: Callable[[], Any]):
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num):
            threading.Thread(target=_serve, args=(self._tasks, make), daemon=True).start()
        weakref.finalize(self, _end, self._tasks, num)

    def submit(self, timeout_s: float, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What the task returns or raises; VideoError "hung" or "crashed" in its stead."""
        future: Future[Any] = Future()
        self._tasks.put((future, timeout_s, task, arguments))
        return future


def _end(tasks: queue.SimpleQueue[Any], num: int) -> None:
    for _ in range(num):
        tasks.put(None)


def _serve(tasks: queue.SimpleQueue[Any], make: Callable[[], Any]) -> None:
    """A thread of the parent: one task after the other, in a process of its own."""
    worker = _Worker(make)
    while (work := tasks.get()) is not None:
        future, timeout_s, task, arguments = work
        try:
            future.set_result(worker.call(timeout_s, task, arguments))
        except BaseException as error:  # whoever waits for the task is to see it
            future.set_exception(error)
        del work, future
    worker.kill()


class _Worker:
    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._process: Any = None
        self._pipe: Any = None

    def call(self, timeout_s: float, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._process is None:
            self._start()
        return self._answer(timeout_s, (task, arguments))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        _make_room_for_socket()
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._make), daemon=True)
        with deaf_to_interrupts():
            self._process.start()
        other.close()
        self._answer(START_S, None)

    def _answer(self, timeout_s: float, message: Any) -> Any:
        try:
            if message is not None:
                self._pipe.send(message)
            if not self._pipe.poll(timeout_s):
                self.kill()
                raise VideoError(
                    f"was not decoded within {timeout_s:g} s; replace it, or raise "
                    "video.timeout_s.",
                    "hung",
                )
            error, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.kill()
            raise VideoError(
                f"ended the process that decoded it (exit code {code}); replace it.", "crashed"
            ) from None
        if error is not None:
            raise error
        return result


def _make_room_for_socket() -> None:
    """Give multiprocessing a directory in which the fork server's socket has a name short enough.

    It takes the first one it makes for the whole process, so under a long TMPDIR that one is made
    in a short directory. Raises ConfigError if there is none.
    """
    with _socket_lock:
        if len(os.fsencode(tempfile.gettempdir())) <= MAX_TMPDIR:
            return
        chosen, tempfile.tempdir = tempfile.tempdir, SHORT_TMPDIR
        try:
            if len(os.fsencode(multiprocessing.util.get_temp_dir())) > MAX_TMPDIR + OWN_NAME:
                raise OSError("another part of this process chose it")
        except OSError as error:
            raise ConfigError(
                f"TMPDIR={chosen} is longer than the {MAX_TMPDIR} characters that the socket of "
                f"the decoding processes allows, and {SHORT_TMPDIR} cannot take its place "
                f"({error.strerror or error}); set TMPDIR to a shorter directory."
            ) from None
        finally:
            tempfile.tempdir = chosen


def _work(pipe: Connection, make: Callable[[], Any]) -> None:
    """The process: it says that it is ready, then answers task after task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    end_with_starter()  # the fork server ends with the parent; a hanging decoder sees no pipe
    made = None
    answer = _attempt(make)
    if answer[0] is None:
        made, answer = answer[1], (None, None)
    try:
        while True:
            pipe.send(answer)
            task, arguments = pipe.recv()
            answer = _attempt(task, made, *arguments)
    except (EOFError, ConnectionError):
        return  # the parent is gone


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Exception | None, Any]:
    """(error, result). An error of ours travels as text: its traceback cannot."""
    try:
        return None, function(*arguments)
    except UserError as error:
        return error, None
    except Exception:
        return RuntimeError(f"in a decoding process:\n{traceback.format_exc()}"), None
