"""Replace this process by a program that ends when its parent does: launch.py SIGNAL PARENT PROGRAM ...

A separate program, because no Python code may run between fork and exec of a process with threads. The kernel sends
SIGNAL (a number; 0 for none) when PARENT, a process id, ends.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Never returns: executes the program, or exits with the reason why that is impossible."""
    number, parent, *command = sys.argv[1:]
    if int(number):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("what started this has ended")
    # Python ignores these two, and the parent may block others: restore the defaults for the program.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
