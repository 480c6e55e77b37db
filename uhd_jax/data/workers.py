"""Work on all samples of a source, in stretches, here or in processes that each open the source themselves."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # of a worker process


class WorkerError(RuntimeError):
    """A worker process is gone: killed, or out of memory."""


class Job(Protocol[Item, Result]):
    """Pickled into every worker, so it is small: configuration, no data."""

    def open(self) -> Callable[[Item], Result]:
        """Opens what the work needs; called once per process."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stretches(count: int, length: int) -> list[range]:
    """0 to `count` cut into ranges of `length`, the last one maybe shorter."""
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


def run(job: Job[Item, Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results of a job for each item, in their order.

    Args:
      job: what is done.
      items: what it is done to.
      workers: processes; with fewer than two, or one item, everything is done in this one.

    Raises:
      WorkerError: a process is gone. Errors of the job itself come as they are.
    """
    items = list(items)
    workers = min(workers, len(items))
    if workers < 2:
        yield from map(job.open(), items) if items else ()
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads that it does not have
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    rest = iter(items)
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (job,)) as pool:
        try:
            waiting.extend(pool.submit(_do, item) for item in itertools.islice(rest, 2 * workers))
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(_do, item) for item in itertools.islice(rest, 1))
                yield done
        except BrokenProcessPool:
            raise WorkerError(
                "a worker process is gone, killed or out of memory; run it again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(job: Job) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = job.open()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
