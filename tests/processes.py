"""How the tests start other processes: with the signals that they need, and with patience for a busy machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds; so long a test waits before it says that something hangs
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # on which a training stops


def default_signals(ignored: tuple[int, ...] = ()) -> None:
    """Let this process take signals as one that a terminal started, however the tests were started.

    `nohup` and a shell's `&` make their children ignore SIGHUP and SIGINT, and whatever these start in turn.
    """
    for number in STOPPING:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in ignored else default)


def launch_jobs(jobs: dict[Path, dict[str, Any]], home: Path) -> None:
    """Run record_run.py's jobs, one after the other, on two processes: starting takes longer than training.

    Args:
        jobs: folder, which is made -> "script", "flags", and perhaps "config", a file of `accelerate launch`.
        home: an empty folder for what the launch needs.
    """
    for folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
    file = home / "jobs.json"
    file.write_text(json.dumps({str(folder): job for folder, job in jobs.items()}))
    command = [sys.executable, str(ROOT / "tests" / "record_run.py"), str(file)]
    added = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    done = subprocess.run(command, env=os.environ | added, cwd=home, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What each process of a job recorded, by rank."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9].json"))]
