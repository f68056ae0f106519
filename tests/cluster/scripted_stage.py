"""A command that notes that it ran, and then does as it is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    name, order, behaviour = argv
    with Path(order).open("a") as file:
        file.write(f"{name} ")
    if behaviour == "fail":
        subprocess.run([sys.executable, "-c", "print('out of eggs')"], check=True)
        return 3
    if behaviour == "raise":
        raise ValueError("out of milk")
    if behaviour == "die once" and Path(order).read_text().split().count(name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0
