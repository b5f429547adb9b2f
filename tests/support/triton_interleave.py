"""Programs of one interpreted launch side by side, in an order drawn from a seed.

Triton's interpreter runs the programs of a grid one after another, so that a kernel whose programs
wait for each other is hardly tested by it: the first one does all the work. Here each program is a
thread, exactly one of them runs at a time, and before every atomic and every store another one may
take over. A wait that nobody will ever end becomes a Deadlock instead of a hang.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from unittest import mock


class Deadlock(AssertionError):
    """The programs have gone on switching far longer than any correct launch would."""


class _Stop(BaseException):
    """Ends the threads of a launch that has failed elsewhere."""


class _Launch:
    """Stands in for the function of a kernel: one call runs all programs."""

    def __init__(self, fn: Callable, programs: int, seed: int, limit: int) -> None:
        self.fn, self.programs, self.limit = fn, programs, limit
        self.random = random.Random(seed)
        self.switches = 0
        self.failure: BaseException | None = None
        self.running: list[int] = []
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.done = threading.Semaphore(0)
        self.current = threading.local()
        # What the interpreter looks at in a function.
        self.__signature__ = inspect.signature(fn)
        self.__globals__ = fn.__globals__
        self.__name__ = fn.__name__

    def __call__(self, **arguments: object) -> None:
        from triton.runtime.interpreter import interpreter_builder

        interpreter_builder.set_grid_dim(self.programs, 1, 1)
        self.running = list(range(self.programs))
        threads = [
            threading.Thread(target=self._program, args=(i, arguments)) for i in self.running
        ]
        for thread in threads:
            thread.start()
        self._wake()
        self.done.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def switch(self) -> None:
        """Let another program go on, perhaps."""
        me = self.current.program
        self.switches += 1
        if self.switches > self.limit:
            raise Deadlock(f"{len(self.running)} programs after {self.switches} switches")
        self._wake()
        self._take_turn(me)

    def _program(self, i: int, arguments: dict[str, object]) -> None:
        self.current.program = i
        try:
            self._take_turn(i)
            self.fn(**arguments)
        except _Stop:
            pass
        except BaseException as failure:
            # Raised again in the thread of the test.
            self.failure = self.failure or failure
        self.running.remove(i)
        if self.running:
            self._wake()
        else:
            self.done.release()

    def _wake(self) -> None:
        self.turns[self.random.choice(self.running)].release()

    def _take_turn(self, i: int) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self.turns[i].acquire()
        if self.failure is not None:
            raise _Stop
        interpreter_builder.set_grid_idx(i, 0, 0)


@contextlib.contextmanager
def interleaved(seed: int, *, limit: int = 100_000) -> Iterator[list[_Launch]]:
    """Run every launch inside the block with its programs interleaved; yields the launches."""
    from triton.runtime import interpreter

    builder, launches = interpreter.InterpreterBuilder, []

    class Executor(interpreter.GridExecutor):
        def __call__(self, *arguments: object, **keywords: object) -> object:
            launches.append(_Launch(self.fn, self.grid[0], seed, limit))
            self.fn, self.grid = launches[-1], (1,)
            return super().__call__(*arguments, **keywords)

    def switching(method: Callable) -> Callable:
        def wrapped(self: object, *arguments: object) -> object:
            launches[-1].switch()
            return method(self, *arguments)

        return wrapped

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter, "GridExecutor", Executor))
        for name in ("create_atomic_rmw", "create_masked_store"):
            method = switching(getattr(builder, name))
            patches.enter_context(mock.patch.object(builder, name, method))
        yield launches
