"""Ctrl-C while a worker starts comes after it has started."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from crosslayer.workers import without_interrupts


@pytest.fixture
def other_thread():
    """One that takes signals which the main thread blocks."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


def test_an_interruption_waits(other_thread):
    done = []

    def start():
        with without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_one_that_does_not_come_is_not_made_up():
    with without_interrupts():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_started_there_never_see_it():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('here')"
    with without_interrupts():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr


def test_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_in_another_thread():
    """Which no interruption reaches."""
    left = []

    def work():
        with without_interrupts():
            left.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.SIGINT in left[0]
