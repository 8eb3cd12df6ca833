"""Ctrl-C: one line and the end within two seconds, whatever is under way, and the command that goes on.

The first one raises KeyboardInterrupt in the main thread, as ever. What does not end the command in time (a long call
into a library, threads or processes that somebody waits for) is ended by a thread that watches. This file imports
nothing heavy: it is at work before the rest of the command line is loaded.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ..private import run_exit_functions

PATIENCE_S = 1.3
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

_interrupted = threading.Event()
_watching = threading.Event()
_said = threading.Event()
_run: tuple[Path, int | None] | None = None  # its run.json, and the time of what was there before


def watch() -> None:
    """From here on Ctrl-C ends this process in time. Does nothing where it is ignored (nohup), or a second time."""
    global _run
    _run = None
    is_main_thread = threading.current_thread() is threading.main_thread()
    if _watching.is_set() or not is_main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    _watching.set()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _on_interrupt)
    threading.Thread(target=_end_in_time, args=(reader,), daemon=True).start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def was_interrupted() -> bool:
    """Whether Ctrl-C has come: what libraries raise afterwards are its consequences."""
    return _interrupted.is_set()


def goes_on(folder: str | Path, *, resume: bool) -> None:
    """Note that this command can be gone on with, once its folder holds a run.

    Args:
        resume: it goes on with the run that is there already.
    """
    global _run
    path = Path(folder) / "run.json"
    _run = (path, None if resume else _time_of(path))


def end(message: str = "interrupted", code: int = 1) -> NoReturn:
    """Say the line, with the command that goes on, and exit."""
    say(message)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit: at once after Ctrl-C, and in a launch of several processes.

    There DTensor's caches keep the process group beyond its end, and with it gloo's threads: one that lets go of a
    tensor while the interpreter is taken down aborts the process.
    """
    distributed = sys.modules.get("torch.distributed")
    is_launched = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if is_launched and code in (0, STOPPED):
        distributed.destroy_process_group()  # type: ignore[union-attr]
    if _interrupted.is_set() or is_launched:
        _leave_at_once(1 if _interrupted.is_set() else code)
    sys.exit(code)


def _leave_at_once(code: int) -> NoReturn:
    """End this process and those that work for it: what is registered for the exit is done, but nobody is waited for,
    and no library taken down piece by piece."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises where a loader's worker ends early
    for name in ("multiprocessing", "multiprocess"):
        if name in sys.modules:
            for child in sys.modules[name].active_children():
                child.kill()
    run_exit_functions()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def say(message: str = "interrupted") -> None:
    """The one line about an early end, on standard error; from the first process of a launch alone."""
    if (_interrupted.is_set() and _said.is_set()) or int(os.environ.get("RANK", "0")) != 0:
        return
    _said.set()
    command = command_to_go_on()
    going_on = "" if command is None else f"; to go on: {command}"
    start = "\n" if sys.stderr.isatty() else ""  # below the bar, and the ^C of the terminal
    with contextlib.suppress(OSError):
        print(f"{start}crosslayer: error: {' '.join(message.split())}{going_on}", file=sys.stderr, flush=True)


def command_to_go_on() -> str | None:
    """The command that goes on with the run under way; None where there is none yet."""
    if _run is None:
        return None
    path, before = _run
    if _time_of(path) in (None, before):
        return None
    arguments = [argument for argument in _without_resume_from(sys.argv[1:]) if argument not in _WHERE_TO_START]
    if "RANK" in os.environ:  # a launcher stands before it
        return "the same with --resume"
    import shlex

    return shlex.join(["crosslayer", *arguments, "--resume"])


_WHERE_TO_START = ("--overwrite", "--resume")


def _without_resume_from(arguments: list[str]) -> Iterator[str]:
    """The run has gone on from there: its newest checkpoint is the one to go on from now."""
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.replace("-", "_").partition("=")
        if name != "__resume_from":
            yield argument
        elif not equals:
            next(rest, None)


def _time_of(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _on_interrupt(signum, frame) -> None:
    if _interrupted.is_set():
        return  # the second one changes nothing: the end is near
    _interrupted.set()
    # Where an interruption hits a callback that cannot raise, Python would print it.
    sys.unraisablehook = lambda unraisable: None
    threading.excepthook = lambda args: None
    raise KeyboardInterrupt


def _end_in_time(reader: int) -> None:
    while signal.SIGINT not in os.read(reader, 64):
        pass
    time.sleep(PATIENCE_S)
    threading.Thread(target=say, daemon=True).start()  # standard error may be stuck
    time.sleep(0.1)
    os._exit(1)  # workers see that it is gone (workers.py), and so do those of torch's loaders


def _in_child() -> None:
    """A forked worker: its parent answers to Ctrl-C, and ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


__all__ = ["PATIENCE_S", "STOPPED", "command_to_go_on", "end", "goes_on", "leave", "say", "was_interrupted", "watch"]
