"""Become another program that ends when the process which started it does: launch.py SIGNAL PARENT PROGRAM ...

A program of its own, as nothing of Python may run between fork and exec of a process with threads. SIGNAL (a number; 0
for none) is what the kernel sends when PARENT, a process id, is gone.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Never returns: the program takes over, or the reason why it cannot is the exit message."""
    number, parent, *command = sys.argv[1:]
    if int(number):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("what started this has ended")
    # Python ignores these two, and who has started us may block some: the program shall find all as usual.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
