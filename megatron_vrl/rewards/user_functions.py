"""A user's own functions of an answer, in processes of their own, each call under a time limit.

A call that raises, dies or takes too long costs itself alone: it comes back as an error in one
sentence, and a process that hangs is killed and replaced. Nothing of the trainer's is shared with
the functions but what they are called with, which is pickled. Calls go to a process a few at a
time and come back one by one, so that a short call does not wait for a process to wake up. Left
out: keeping a function's state over a replacement; functions that need the trainer's device.
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
from megatron_vrl.process.parent_death import end_with_starter
from megatron_vrl.types import VideoSample

START_S = 120.0  # a process may import as much as the function's module asks for
CALLS_AT_A_TIME = 8


class Call(NamedTuple):
    function: str  # a name of `paths`
    response: str
    sample: VideoSample


class Returned(NamedTuple):
    value: float  # NaN with an error
    error: str  # "" when the call returned a number; else what it did instead


def load_function(path: str) -> Callable[..., Any]:
    """`package.module:function`. Raises ConfigError saying which half is wrong."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{path!r} is not a function; write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does
        raise ConfigError(
            f"{path!r}: the module does not import ({_sentence(error)}); PYTHONPATH decides where "
            "it is looked for."
        ) from None
    if name not in vars(module) or not callable(vars(module)[name]):
        raise ConfigError(f"{path!r}: {module_name} has no function {name!r}.")
    function: Callable[..., Any] = vars(module)[name]
    return function


class Workers:
    def __init__(self, paths: Mapping[str, str], count: int, timeout_s: float) -> None:
        """Raises ConfigError if a function cannot be loaded in a process of its own."""
        self._paths, self._timeout_s = dict(paths), timeout_s
        # A forked child would hold the trainer's threads' locks and its GPU context.
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(count)]
        for worker in self._workers:
            worker.await_ready()

    def run(self, calls: Sequence[Call]) -> list[Returned]:
        """Results in the order of the calls."""
        results: dict[int, Returned] = {}
        waiting = deque(range(len(calls)))
        idle, busy = list(self._workers), list[_Busy]()
        while waiting or busy:
            while waiting and idle:
                share = min(CALLS_AT_A_TIME, -(-len(waiting) // len(self._workers)))
                task = _Busy(idle.pop(), deque(waiting.popleft() for _ in range(share)), 0.0)
                task.worker.connection.send([calls[number] for number in task.numbers])
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
                    waiting.extendleft(reversed(task.numbers))
                    task.numbers.clear()
            idle += [task.worker for task in busy if not task.numbers]
            busy = [task for task in busy if task.numbers]
        return [results[number] for number in range(len(calls))]

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _receive(self, task: "_Busy", results: dict[int, Returned]) -> None:
        try:
            results[task.numbers[0]] = task.worker.connection.recv()
        except (EOFError, OSError):
            task.worker.process.join()
            code = task.worker.process.exitcode
            self._give_up(task, f"ended its process (exit code {code})", results)
            return
        task.numbers.popleft()
        task.deadline_s = time.monotonic() + self._timeout_s

    def _give_up(self, task: "_Busy", error: str, results: dict[int, Returned]) -> None:
        """The call under way has failed; those behind it wait for another process."""
        results[task.numbers.popleft()] = Returned(math.nan, error)
        task.worker.stop()
        new = self._start()
        new.await_ready()
        self._workers[self._workers.index(task.worker)] = new
        task.worker, task.failed = new, True

    def _start(self) -> "_Worker":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._paths), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


class _Worker(NamedTuple):
    process: Any
    connection: Connection

    def await_ready(self) -> None:
        try:
            problem = self.connection.recv() if self.connection.poll(START_S) else "does not start"
        except EOFError:
            problem = "its process ended while it was loaded"
        if problem:
            self.stop()
            raise ConfigError(f"rewards.functions: {problem}")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass(slots=True)
class _Busy:
    worker: _Worker
    numbers: deque[int]  # of its calls, the first one under way
    deadline_s: float  # of that one
    failed: bool = False


def _serve(connection: Connection, paths: Mapping[str, str]) -> None:
    """The life of a worker: it ends with its connection, and in the midst of a call with its
    parent, whose main thread must have started it."""
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
    try:
        value = function(call.response, call.sample)
    except Exception as error:  # the user's code may raise anything
        return Returned(math.nan, f"raised {_sentence(error)}")
    if isinstance(value, Real):
        return Returned(float(value), "")
    return Returned(math.nan, f"returned {value!r:.80}, which is no number")


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
