"""The package as users meet it: floors that import downwards only, one command, and requirements that agree."""

import ast
import importlib
import importlib.metadata
import importlib.resources
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longhaul.launcher import cli, doctor
from longhaul.models.errors import UserError

ROOT = Path(__file__).parents[1]
FLOORS = ("models", "parallel", "launcher", "configs")
BANNED_BELOW = {"models": ("parallel", "launcher"), "parallel": ("launcher",)}


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of all that a module of `package` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def reads_environment(source: str) -> bool:
    """Whether a module touches `os.environ`, `os.getenv` or their like."""
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def package_of(path: Path) -> str:
    return ".".join(("longhaul", *path.relative_to(ROOT).parent.parts))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("floor", BANNED_BELOW)
def test_floors_import_downwards_only(floor: str) -> None:
    banned = [f"longhaul.{name}" for name in BANNED_BELOW[floor]]
    upward = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(floor)
        for name in imported_modules(path.read_text(), package_of(path))
        if any(within(name, package) for package in banned)
    ]
    assert not upward


def test_imports_go_through_the_namespace() -> None:
    """Everywhere: ruff's own ban is off in parallel/ and tests/, which may use torch.distributed."""
    bare = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(*FLOORS, "tests")
        for name in imported_modules(path.read_text(), package_of(path))
        if name.split(".")[0] in FLOORS
    ]
    assert not bare


def test_environment_is_read_in_launcher_only() -> None:
    files = python_files("models", "parallel", "configs")
    assert not [str(path) for path in files if reads_environment(path.read_text())]


@pytest.mark.parametrize(
    "source",
    [
        "import longhaul.parallel",
        "from longhaul import parallel",
        "from ..parallel.comm import Comm",
        "def f():\n    from .. import parallel",
    ],
)
def test_the_import_walk_sees_every_form(source: str) -> None:
    assert any(within(name, "longhaul.parallel") for name in imported_modules(source, "longhaul.models"))


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A']", "from os import environ", "import os as o\no.getenv('A')", "from os import getenv"],
)
def test_the_environment_walk_sees_every_form(source: str) -> None:
    assert reads_environment(source)


@pytest.mark.parametrize(
    ("where", "source", "banned"),
    [
        ("models", "import models.errors", "models"),
        ("models", "from parallel.comm import Comm", "parallel"),
        ("launcher", "from launcher import train", "launcher"),
        ("launcher", "import configs", "configs"),
        ("models", "import torch.distributed as dist", "torch.distributed"),
        ("launcher", "from torch import distributed", "torch.distributed"),
        ("launcher", "import torch.distributed.checkpoint", "torch.distributed"),
        ("models/ops", "import torch\n\ntorch.distributed.get_rank()", "torch.distributed"),
        ("parallel", "import torch.distributed as dist", None),
        ("models/ops", "from ..errors import UserError", None),
        ("launcher", "from longhaul.models.errors import UserError", None),
    ],
)
def test_ruff_bans(where: str, source: str, banned: str | None) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json", "--no-cache"]
    name = ["--stdin-filename", f"{where}/planted.py", "-"]
    run = subprocess.run([*command, *name], input=f"{source}\n", cwd=ROOT, capture_output=True, text=True)
    found = [violation["message"] for violation in json.loads(run.stdout)]
    assert len(found) == (0 if banned is None else 1), run.stdout + run.stderr
    assert banned is None or f"`{banned}` is banned" in found[0]


def test_every_folder_with_code_is_a_package() -> None:
    """Else `find_packages` leaves it out of a built package, though an editable install finds it."""
    files = [*python_files(*FLOORS), *(ROOT / "configs").rglob("*.yaml")]
    folders = {path.parent for path in files}
    assert not [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]


def test_launcher_shadows_no_standard_module() -> None:
    """`torchrun launcher/train.py` puts launcher/ first on the path."""
    names = {path.stem for path in (ROOT / "launcher").iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_types_and_configurations_are_found_as_resources() -> None:
    for floor in ("models", "parallel", "launcher"):
        assert importlib.resources.files(f"longhaul.{floor}").joinpath("py.typed").is_file()
    shipped = {path.name for path in importlib.resources.files("longhaul.configs").iterdir()}
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= shipped


def requirements() -> dict[str, set[str]]:
    """Extra ("" for none) -> names of the distributions that it asks for."""
    found: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("longhaul") or []:
        extra = re.search(r"extra == [\"']([\w-]+)[\"']", line)
        found.setdefault(extra[1] if extra else "", set()).add(re.split(r"[^\w.-]", line)[0].lower())
    return found


def test_the_doctor_knows_every_requirement() -> None:
    asked = requirements()
    assert asked.pop("") == {"torch", *doctor.REQUIRED}
    asked.pop("test")
    for package, (extra, _) in doctor.OPTIONAL.items():
        assert package in asked[extra]
    assert set().union(*asked.values()) == set(doctor.OPTIONAL)


def test_constraints_pin_every_direct_requirement() -> None:
    asked = requirements()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert pinned == (asked[""] | asked["test"] | asked["data"] | asked["deepspeed"]) - {"longhaul"}


def test_the_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] and checks["torch"]["ok"] and checks["gloo"]["ok"]
    assert {package["package"] for package in found["optional"]} == set(doctor.OPTIONAL)


def test_the_doctor_fails_where_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-distribution",))
    monkeypatch.setattr(doctor, "MIN_TORCH", (99, 0))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"no-such-distribution +missing +missing", printed)
    assert re.search(r"torch +\S+ +missing", printed)


def test_the_doctor_survives_a_torch_that_does_not_import(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["torch"]["ok"] is False and "does not import" in checks["torch"]["value"]


def test_help_lists_commands_without_importing_torch() -> None:
    program = "import sys; from longhaul.launcher import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for command, (_, line) in cli.COMMANDS.items():
        assert re.search(rf"{command} +{line}", run.stdout)


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"longhaul {importlib.metadata.version('longhaul')}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_listed_command_exists(command: str) -> None:
    assert callable(importlib.import_module(cli.COMMANDS[command][0]).main)


@pytest.mark.parametrize(("typed", "remedy"), [("trian", "did you mean 'train'?"), ("zzz", "the commands are train, ")])
def test_unknown_command_names_the_nearest(typed: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: There is no command {typed!r}: {remedy}")


def test_a_user_s_mistake_ends_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: list[str]) -> int:
        raise UserError(f"There is no file {argv[0]!r}: give one that exists.")

    assert cli.run_command(command, ["x.yaml"]) == 2
    assert capsys.readouterr() == ("", "error: There is no file 'x.yaml': give one that exists.\n")


def test_interrupting_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def command(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert cli.run_command(command, []) == 130
    assert capsys.readouterr() == ("", "")


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run_command(lambda argv: 1 // 0, [])
