"""Kill a process with SIGKILL at every step of a scenario, and look at what it leaves.

A step is a moment just before or just after a call that changes the disk. Each is tried once: a forked child
runs the scenario and kills itself there, then `check` looks at the folder; until a child comes through.
Forking is safe in a process with one thread only, so a test module runs its scenarios by `in_own_process`.
"""

import functools
import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

_CALLS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "truncate", "unlink")
# A kill loses nothing that was written, synced or not, so a folder in memory serves and is much faster.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_left = None  # steps until the end; None in a process that is not to die


def step():
    """A moment at which the process may be killed; scenarios may name further ones by calling this."""
    global _left
    if _left is not None:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _stepping(function):
    @functools.wraps(function)
    def call(*arguments, **options):
        step()
        result = function(*arguments, **options)
        step()
        return result

    return call


class _SteppingConnection(sqlite3.Connection):
    execute = _stepping(sqlite3.Connection.execute)
    executemany = _stepping(sqlite3.Connection.executemany)


def _die_at_step(number):
    global _left
    for name in _CALLS:
        setattr(os, name, _stepping(getattr(os, name)))
    sqlite3.connect = functools.partial(sqlite3.connect, factory=_SteppingConnection)
    _left = number


def _die_at_byte(number):
    """Let the kernel end the process at the first write past this size of any file, half of it done."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def _every(numbers, arm, expected, prepare, scenario, check):
    """Run the scenario in a child per number; return how many children died."""
    for deaths, number in enumerate(numbers):
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            folder = Path(name)
            prepare(folder)
            child = os.fork()
            if child == 0:
                try:
                    arm(number)
                    scenario(folder)
                    os._exit(0)
                except BaseException:  # the child must not run on into the parent's code
                    traceback.print_exc()
                    os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, -expected), f"the child ended with {code} at {number}"
            try:
                check(folder)
            except BaseException:
                print(f"after the kill at {number}: {sorted(map(str, folder.rglob('*')))}", file=sys.stderr)
                raise
            if code == 0:
                return deaths
    raise AssertionError("no child came through")


def at_every_step(prepare, scenario, check, stride=1):
    return _every(itertools.count(1, stride), _die_at_step, signal.SIGKILL, prepare, scenario, check)


def at_bytes(numbers, prepare, scenario, check):
    return _every(numbers, _die_at_byte, signal.SIGXFSZ, prepare, scenario, check)


def in_own_process(module, name, seconds=120):
    """Run ``python MODULE NAME``, whose `main` is below; return the number of kills."""
    result = subprocess.run([sys.executable, module, name], capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def main(scenarios):
    print(scenarios[sys.argv[1]]())


@contextmanager
def full_disk(size):
    """Let every write past this size of any file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
