"""The console command `longhaul <command>`: a table of commands, each imported only when it runs."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from longhaul.models.errors import UserError

# Command -> module with `main(argv: list[str]) -> int`, and one line of help.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("longhaul.launcher.train", "train a model from a configuration"),
    "generate": ("longhaul.launcher.generate", "continue a text with a trained model"),
    "evaluate": ("longhaul.launcher.evaluate", "measure what models can do: a run, or small ones on synthetic tasks"),
    "report": ("longhaul.launcher.report", "write the one-page report of a run"),
    "bench": ("longhaul.launcher.bench", "measure steps, memory and communication"),
    "verify": ("longhaul.launcher.verify", "prove that N ranks equal one, on this machine"),
    "plan": ("longhaul.launcher.plan", "show how uneven documents would be spread over ranks, and what to change"),
    "doctor": ("longhaul.launcher.doctor", "say what this machine has and what is missing"),
}

USER_ERROR = 2  # the exit code of what a person can mend
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; those of the process by default.

    Returns:
        The exit code: the command's own, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"longhaul {importlib.metadata.version('longhaul')}")
        return 0
    return run_command(lambda arguments: _load(command)(arguments), rest)


def run_command(function: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Call a command's `main` so that a mistake of the user ends in one sentence and not in a traceback.

    Scripts that start without `longhaul`, as `launcher/train.py` does under torchrun, call it too.
    """
    try:
        return function(list(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _load(command: str) -> Callable[[list[str]], int]:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"There is no command {command!r}: {remedy}")
    function: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command][0]).main
    return function


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: longhaul COMMAND [ARGUMENTS]",
            "",
            "Trains linear, hybrid and softmax language models on very long sequences.",
            "",
            "commands:",
            *(f"  {command:{width}}  {line}" for command, (_, line) in COMMANDS.items()),
            "",
            "longhaul COMMAND --help explains a command; longhaul --version says which Longhaul this is.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
