"""Independent pieces of work over processes, or one after another in this one.

    with Pool(shared, processes) as pool:
        job = pool.start(function, *args)               # function(shared, *args), at the top level of a module
        job.result()
        for task, result in pool.each(function, tasks)  # function(shared, task), as they end

`shared` is sent to every process once. Every piece runs on one thread, here as there, so that results do not depend on
the number of processes. A job of a pool of one process runs when its result is asked for, and not before.
"""
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

import torch


class Pool:
    def __init__(self, shared, processes=1):
        self.shared, self.processes, self.executor = shared, processes, None
        get_ready(processes)
        if processes > 1:
            # Pickled here and below: left to multiprocessing, tensors would travel through /dev/shm, which is small
            # in containers. In a list, from which a process takes it: the executor would keep it beside the data.
            self.others = multiprocessing.active_children()
            self.executor = concurrent.futures.ProcessPoolExecutor(processes, _context(), _begin,
                                                                   ([pickle.dumps(shared)],))

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.executor is not None:
            self.executor.shutdown(wait=not error, cancel_futures=True)
            for process in multiprocessing.active_children() if error else ():
                if process not in self.others:
                    process.terminate()                     # an interrupt must not wait for a fit to end

    def start(self, function, *args):
        if self.executor is None:
            return _Later(self, function, args)
        with self._told():
            return _Sent(self.executor.submit(_run, pickle.dumps((function, args))), self._told)

    @contextlib.contextmanager
    def _told(self):
        """What the user can do about a process that was killed."""
        try:
            yield
        except (BrokenProcessPool, BrokenPipeError) as err:
            raise OSError(f"one of {self.processes} processes was killed, most likely because memory ran out.\n"
                          "  Run the same command again with fewer of them: --set WORKERS=1. Finished members and "
                          "refits are kept.") from err

    def each(self, function, tasks):
        """(task, function(shared, task)) as they end; tasks hashable."""
        jobs = {self.start(function, task): task for task in tasks}
        if self.executor is None:
            ended = jobs
        else:
            sent = {job.future: job for job in jobs}
            ended = (sent[future] for future in concurrent.futures.as_completed(sent))
        for job in ended:
            yield jobs[job], job.result()


def get_ready(processes):
    """Start the server that processes are forked from. Before the data are read: its imports take some seconds.

    It must not hear interrupts, which are for this process, and minds them only after its imports.
    """
    if processes > 1 and _context().get_start_method() == "forkserver":
        with _deaf():
            multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _deaf():
    """SIGINT ignored, which processes started now inherit. Only the main thread may do that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _context():
    """How processes start: never as a fork of this one, whose torch threads would be copied in whatever state they are.

    A server that has imported what is slow to import once forks them in no time: one process gets its data only when
    the one before has imported this program. Elsewhere than on Linux libraries forbid even that.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo",        # which every optimiser imports, in two seconds
                                    "scipy.stats", "pandas", "h5py"])
    return context


class _Later:
    """A job in this process."""

    def __init__(self, pool, function, args):
        self.pool, self.function, self.args = pool, function, args

    def result(self):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.function(self.pool.shared, *self.args)
        finally:
            torch.set_num_threads(before)


class _Sent:
    """A job in another process."""

    def __init__(self, future, told):
        self.future, self.told = future, told

    def result(self):
        with self.told():
            return pickle.loads(self.future.result())


def _begin(shared):
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # the parent hears it, and ends its pool
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _shared = pickle.loads(shared.pop())
    torch.set_num_threads(1)


def _end_with_the_parent():
    """A worker waits for work on a pipe that it holds open itself: without this it would outlive a killed parent."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(job):
    function, args = pickle.loads(job)
    return pickle.dumps(function(_shared, *args))
