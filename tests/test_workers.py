"""Pieces of work give the same results in one process and in several; what goes wrong in one of them is told."""
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import workers
from workers import Pool


def power(shared, exponent):
    assert torch.get_num_threads() == 1
    return shared["base"] ** exponent


def fail(shared, task):
    raise ValueError(f"task {task} of {shared['base'].item():g}")


def die(shared):
    os.kill(os.getpid(), signal.SIGKILL)


def who(shared, task):
    return os.getpid()


def sleep(shared, seconds):
    time.sleep(seconds)


@pytest.fixture(params=[1, 2])
def pool(request):
    with Pool({"base": torch.tensor(3.0)}, request.param) as pool:
        yield pool


def test_results_come_back_with_their_tasks_and_threads_stay_as_they_were(pool):
    before = torch.get_num_threads()
    assert {task: found.item() for task, found in pool.each(power, [1, 2, 3])} == {1: 3, 2: 9, 3: 27}
    assert pool.start(power, 4).result() == 81
    assert torch.get_num_threads() == before


def test_a_pool_can_be_made_beside_the_main_thread():
    """Only the main thread may say what becomes of interrupts."""
    found = []

    def work():
        with Pool({"base": torch.tensor(3.0)}, 2) as pool:
            found.append(pool.start(power, 2).result().item())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [9]


def test_processes_start_deaf_to_interrupts_which_this_one_hears_again():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), workers._deaf():
        deaf = subprocess.run([sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT).name)"],
                              capture_output=True, text=True).stdout
        raise RuntimeError
    assert deaf.strip() == "SIG_IGN"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_keeps_its_kind_and_its_words(pool):
    with pytest.raises(ValueError, match="task 5 of 3"):
        pool.start(fail, 5).result()


def test_a_pool_of_one_does_nothing_that_is_not_asked_for():
    with Pool({"base": torch.tensor(1.0)}) as pool:
        pool.start(fail, 0)


def test_a_killed_process_ends_with_advice():
    with pytest.raises(OSError, match="--set WORKERS=1"), Pool({}, 2) as pool:
        pool.start(die).result()


def test_a_pool_that_ends_leaves_no_process():
    with Pool({}, 2) as pool:
        assert dict(pool.each(who, [0])).keys() == {0}
        assert len(multiprocessing.active_children()) > len(pool.others)
    assert set(multiprocessing.active_children()) <= set(pool.others)


def test_an_error_does_not_wait_for_the_jobs_that_run():
    start = time.time()
    with pytest.raises(KeyboardInterrupt), Pool({}, 2) as pool:
        pool.start(sleep, 0).result()                       # the processes are up
        pool.start(sleep, 60)
        raise KeyboardInterrupt
    assert time.time() - start < 40                         # starting takes seconds on a busy machine, sleeping 60


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_with_a_parent_that_is_killed():
    code = ("import test_workers as t; from workers import Pool\n"
            "if __name__ == '__main__':\n"
            "    with Pool({}, 2) as pool:\n"
            "        print(pool.start(t.who, 0).result(), flush=True); pool.start(t.sleep, 600).result()\n")
    here = Path(__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"})
    worker = Path(f"/proc/{int(parent.stdout.readline())}")
    assert worker.exists()
    parent.kill()
    parent.wait()
    end = time.time() + 20                                  # it takes milliseconds; a busy machine may need longer
    while worker.exists() and "zombie" not in (worker / "status").read_text() and time.time() < end:
        time.sleep(0.1)
    assert time.time() < end
