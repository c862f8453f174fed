"""Runs both scripts in an interpreter that lacks what Windows lacks; test_elsewhere.py starts it in its own process.

python tests/bare_run.py JOBS.json

JOBS.json is a list of pairs: a script's name, and its flags.
"""

import gc
import importlib
import json
import os
import pathlib
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  libraries first: they have their own ways on Windows
import datasets  # noqa: F401
import diffusers  # noqa: F401
import peft  # noqa: F401
import psutil  # noqa: F401
import transformers  # noqa: F401


def take_away() -> None:
    """Leave the interpreter without Unix: modules, signals, the parent's number, open folders, slashes in paths."""
    for module in ("fcntl", "resource"):
        sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ImportError
    for name in ("SIGHUP", "SIGUSR1"):
        delattr(signal, name)
    del os.getppid
    open_any, relative_to = os.open, pathlib.PurePath.relative_to

    def open_files_only(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return open_any(path, *rest, **options)

    def with_backslashes(self: pathlib.PurePath, *other: Any) -> pathlib.PurePath:
        return pathlib.PureWindowsPath(relative_to(self, *other))

    os.open = open_files_only
    pathlib.PurePath.relative_to = with_backslashes  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    take_away()
    for name, argv in json.loads(Path(sys.argv[1]).read_text()):
        script = importlib.import_module(name)
        gc.freeze()  # as the scripts do when they are started: each of their collections would take 0.3 s
        script.main(script.parse_args(argv))
