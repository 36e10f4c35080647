"""Decoding processes: files are opened and decoded in processes that can be killed.

The states of a process:

  NONE -> STARTING   on the first task: forked from the fork server, makes its decoder
  STARTING -> IDLE   ready; a process that needs more than START_S is killed
  IDLE -> BUSY       one task at a time
  BUSY -> IDLE       the task returned or raised an exception
  BUSY -> NONE       hung: killed after the task's timeout; or crashed. The task gets a VideoError
  any -> NONE        the Workers object or the parent process ended

Example: with `video.timeout_s: 60` a file that loops forever costs 60 s, its process, and a
VideoError of kind "hung". The next task starts a new process.

The fork server has imported torch and FFmpeg, so a new process takes milliseconds and the trainer's
threads are never forked. Frames return through a pipe, which costs a few percent of decoding them;
shared memory is not used.
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

START_S = 300.0  # timeout for a process to import its libraries and make its decoder
PRELOADED = ["megatron_vrl.video.pyav"]
# A Unix socket address has at most 107 bytes. multiprocessing appends
# "/pymp-xxxxxxxx/listener-xxxxxxxx" to the temporary directory.
OWN_NAME = len("/pymp-") + 8
MAX_TMPDIR = 107 - OWN_NAME - len("/listener-") - 8
SHORT_TMPDIR = "/tmp"
_socket_lock = threading.Lock()


class Workers:
    """Pool of `num` processes. Each calls `make` once and passes the result to every task.

    A task is a function that can be pickled by name, called as `task(made, *arguments)`. Processes
    end with this object or with their parent.
    """

    def __init__(self, num: int, make: Callable[[], Any]):
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(num):
            threading.Thread(target=_serve, args=(self._tasks, make), daemon=True).start()
        weakref.finalize(self, _stop, self._tasks, num)

    def submit(self, timeout_s: float, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return a future of the task's result.

        It raises VideoError if the task hung or crashed.
        """
        future: Future[Any] = Future()
        self._tasks.put((future, timeout_s, task, arguments))
        return future


def _stop(tasks: queue.SimpleQueue[Any], num: int) -> None:
    """Make all serving threads return."""
    for _ in range(num):
        tasks.put(None)


def _serve(tasks: queue.SimpleQueue[Any], make: Callable[[], Any]) -> None:
    """Run tasks one after the other in one decoding process. Runs in a thread of the parent."""
    worker = _Worker(make)
    while (work := tasks.get()) is not None:
        future, timeout_s, task, arguments = work
        try:
            future.set_result(worker.call(timeout_s, task, arguments))
        except BaseException as error:  # raised by `future.result()`
            future.set_exception(error)
        del work, future
    worker.kill()


class _Worker:
    """One decoding process and its pipe, as seen by the parent."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._process: Any = None
        self._pipe: Any = None

    def call(self, timeout_s: float, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run one task. Starts the process if there is none."""
        if self._process is None:
            self._start()
        return self._receive(timeout_s, (task, arguments))

    def kill(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        """Start the process and wait until it is ready."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        _shorten_socket_path()
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_process_main, args=(other, self._make), daemon=True)
        with deaf_to_interrupts():
            self._process.start()
        other.close()
        self._receive(START_S, None)

    def _receive(self, timeout_s: float, message: Any) -> Any:
        """Send the message, if any, and return the reply.

        Kills the process and raises VideoError if there is no reply in time or the process ended.
        """
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


def _shorten_socket_path() -> None:
    """Make multiprocessing use a directory whose path is short enough for the fork server's socket.

    multiprocessing creates one temporary directory per process and reuses it. If TMPDIR is too
    long, the directory is created in /tmp. Raises ConfigError if that is not possible.
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


def _process_main(pipe: Connection, make: Callable[[], Any]) -> None:
    """Main function of a decoding process: reports that it is ready, then runs tasks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    end_with_starter()  # a hanging decoder would not notice a closed pipe
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
        return  # the parent ended


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Exception | None, Any]:
    """Return (error, result).

    Unexpected errors become text, because tracebacks cannot be pickled.
    """
    try:
        return None, function(*arguments)
    except UserError as error:
        return error, None
    except Exception:
        return RuntimeError(f"in a decoding process:\n{traceback.format_exc()}"), None
