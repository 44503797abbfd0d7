"""Runs Python so that it cannot outlive who started it, nor meet another that does the same: what a
sweep starts.

    python -m archscale.sweep.launchers.child LOCK PARENT -m archscale train config.yaml …

LOCK is a file that the command holds while it runs, `-` for none; Python follows in this same
process. PARENT is the process that starts it, 0 for any: when a sweep is killed with -9, its
runs end with it, and one that starts again waits for them to be gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time

PATIENCE = 60.0  # seconds that whoever still holds the lock has to end
PR_SET_PDEATHSIG = 1


def main() -> None:
    lock, parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if int(parent) and os.getppid() != int(parent):  # it ended before the kernel knew
        sys.exit(1)
    if lock != "-" and os.environ.get("RANK", "0") == "0":  # one lock for all ranks
        _hold(lock)
    os.execv(sys.executable, [sys.executable, *arguments])


def _hold(lock: str) -> None:
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    # Held until the last process that has it ends, through the exec.
    os.set_inheritable(handle, True)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                print(
                    f"archscale: another process trains this run ({lock}): end it", file=sys.stderr
                )
                sys.exit(2)
            time.sleep(0.1)


if __name__ == "__main__":
    main()
