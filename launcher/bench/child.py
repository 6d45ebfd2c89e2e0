"""A process of its own for one side of a benchmark, so that its peak memory is its own.

It is asked line by line and answers with lines of JSON; what else it prints goes to a log, which is shown if it ends early.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

Self = TypeVar("Self", bound="Child")


class Child:
    """The parent's end. A context manager: on leaving it, the process ends.

    Args:
        name: for messages.
        module: runs as `python -m module SPEC`.
        spec: what it is to do.
        threads: of torch.
        log: file of what it prints.
    """

    def __init__(self, name: str, module: str, spec: Mapping[str, Any], threads: int, log: Path) -> None:
        self.name = name
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps({**spec, "threads": threads})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, command: str | None = None) -> dict[str, Any]:
        """Send a command, if there is one, and wait for the next answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if command is not None:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            log = self._log.read().strip()
            raise RuntimeError(f"the process of {self.name} ended with code {self._process.wait()}:\n{log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def own_output() -> TextIO:
    """The child's end: the stream of answers. What libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers
