"""Which threads of a machine that is short of cores go first."""

import os
import threading
from contextlib import suppress


def go_first() -> None:
    """Undo Ray's niceness of workers for the calling thread, where we may.

    A step that waits for a core keeps all streams waiting: so does whatever holds the interpreter
    lock of its process, or carries a guide's answer to it. Those who bring tokens to clients find
    another moment.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)
