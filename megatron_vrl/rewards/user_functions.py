"""User's reward functions, run in worker processes with a time limit for each call.

A call that raises, ends its process or takes too long returns an error in one sentence, and no
other call is affected. A worker process that hangs is killed and replaced. The functions share
nothing with the trainer: their arguments are pickled. A worker gets up to CALLS_AT_A_TIME calls in
one message and returns the results one by one, which saves a wake-up for each short call. Left out:
keeping the state of a function when its process is replaced; functions that need the trainer's
device.
"""

import importlib
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from numbers import Real
from typing import Any, NamedTuple

from megatron_vrl.errors import ConfigError
from megatron_vrl.process.parent_death import deaf_to_interrupts, end_with_starter
from megatron_vrl.types import Sample

START_S = 120.0  # limit for starting a process, which imports the function's module
CALLS_AT_A_TIME = 8


class Call(NamedTuple):
    """One call of a function on one response."""

    function: str  # a name of `paths`
    response: str
    sample: Sample


class Returned(NamedTuple):
    """Result of a call: a number, or an error."""

    value: float  # NaN if there is an error
    error: str  # "" if the call returned a number; else a verb phrase, "raised ValueError: ..."


def load_function(path: str) -> Callable[..., Any]:
    """Return the function at `package.module:function`.

    Raises ConfigError saying whether the module or the function is wrong.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{path!r} is not a function; write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"{path!r}: the module does not import ({_sentence(error)}); PYTHONPATH decides where "
            "it is looked for."
        ) from None
    if name not in vars(module) or not callable(vars(module)[name]):
        raise ConfigError(f"{path!r}: {module_name} has no function {name!r}.")
    function: Callable[..., Any] = vars(module)[name]
    return function


class Workers:
    """Pool of `count` processes that each run any of the functions."""

    def __init__(self, paths: Mapping[str, str], count: int, timeout_s: float) -> None:
        """Start the processes. Raises ConfigError if one cannot load a function.

        `paths`: function name -> `package.module:function`; `timeout_s`: limit for one call.
        """
        self._paths, self._timeout_s = dict(paths), timeout_s
        # A forked child would hold the trainer's threads' locks and its GPU context.
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(count)]
        for worker in self._workers:
            worker.await_ready()

    def run(self, calls: Sequence[Call]) -> list[Returned]:
        """Return the results in the order of the calls."""
        results: dict[int, Returned] = {}
        waiting = deque(range(len(calls)))
        idle, busy = list(self._workers), list[_Busy]()
        while waiting or busy:
            while waiting and idle:
                share = min(CALLS_AT_A_TIME, -(-len(waiting) // len(self._workers)))
                task = _Busy(idle.pop(), deque(waiting.popleft() for _ in range(share)), 0.0)
                task.worker.connection.send([calls[number] for number in task.indices])
                task.deadline_s = time.monotonic() + self._timeout_s
                busy.append(task)
            first_s = min(task.deadline_s for task in busy)
            ready = wait([t.worker.connection for t in busy], max(0.0, first_s - time.monotonic()))
            for task in busy:
                if task.worker.connection in ready:
                    self._receive(task, results)
                elif task.deadline_s <= time.monotonic():
                    self._give_up(task, f"took longer than {self._timeout_s:g} s", results)
                if task.failed:
                    waiting.extendleft(reversed(task.indices))
                    task.indices.clear()
            idle += [task.worker for task in busy if not task.indices]
            busy = [task for task in busy if task.indices]
        return [results[number] for number in range(len(calls))]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.stop()

    def _receive(self, task: "_Busy", results: dict[int, Returned]) -> None:
        """Store the result of the call that is running; an error if its process has ended."""
        try:
            results[task.indices[0]] = task.worker.connection.recv()
        except (EOFError, OSError):
            task.worker.process.join()
            code = task.worker.process.exitcode
            self._give_up(task, f"ended its process (exit code {code})", results)
            return
        task.indices.popleft()
        task.deadline_s = time.monotonic() + self._timeout_s

    def _give_up(self, task: "_Busy", error: str, results: dict[int, Returned]) -> None:
        """Store an error for the call that is running, and replace its process.

        `run` gives the remaining calls of the task to any process.
        """
        results[task.indices.popleft()] = Returned(math.nan, error)
        task.worker.stop()
        new = self._start()
        new.await_ready()
        self._workers[self._workers.index(task.worker)] = new
        task.worker, task.failed = new, True

    def _start(self) -> "_Worker":
        """Start a process and return it before it is ready."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._paths), daemon=True)
        with deaf_to_interrupts():
            process.start()
        theirs.close()
        return _Worker(process, ours)


class _Worker(NamedTuple):
    """A process and the parent's end of its connection."""

    process: Any
    connection: Connection

    def await_ready(self) -> None:
        """Wait until the functions are loaded. Raises ConfigError if they cannot be."""
        try:
            problem = self.connection.recv() if self.connection.poll(START_S) else "does not start"
        except EOFError:
            problem = "its process ended while it was loaded"
        if problem:
            self.stop()
            raise ConfigError(f"rewards.functions: {problem}")

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass(slots=True)
class _Busy:
    """A worker with the calls it was given."""

    worker: _Worker
    indices: deque[int]  # indices of its calls; the first call is running
    deadline_s: float  # time.monotonic() at which the running call has taken too long
    failed: bool = False  # the worker was replaced, and the remaining calls must be given out again


def _serve(connection: Connection, paths: Mapping[str, str]) -> None:
    """Main function of a worker process: load the functions, send "" or an error, run calls.

    The process ends when its connection closes. It also ends during a call if its parent dies; the
    parent's main thread must have started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    end_with_starter()
    try:
        functions = {name: load_function(path) for name, path in paths.items()}
    except ConfigError as error:
        connection.send(str(error))
        return
    connection.send("")
    while True:
        try:
            calls: list[Call] = connection.recv()
        except EOFError:
            return
        for call in calls:
            connection.send(_returned(functions[call.function], call))


def _returned(function: Callable[..., Any], call: Call) -> Returned:
    """Run one call and return its number or its error."""
    try:
        value = function(call.response, call.sample)
    except Exception as error:  # the user's code may raise anything
        return Returned(math.nan, f"raised {_sentence(error)}")
    if isinstance(value, Real):
        return Returned(float(value), "")
    return Returned(math.nan, f"returned {value!r:.80}, which is no number")


def _sentence(error: Exception) -> str:
    """Return the type of the error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
