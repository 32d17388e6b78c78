"""Signals to a program at a moment that it says itself."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any


def send_once_there(number: int, process: subprocess.Popen[Any], note: Path) -> None:
    """Send a signal once the process has written the file, or has ended without."""
    while not note.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
