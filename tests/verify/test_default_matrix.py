"""The default matrix of `longhaul verify`, as a person runs it: every mixer, engine and layout, and nothing fails."""

import json
import subprocess
import sys
from pathlib import Path

from longhaul.models.mixers.registry import MIXERS
from longhaul.parallel.attention.registry import ENGINES
from longhaul.parallel.exchange.registry import EXCHANGES


def test_the_default_matrix_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longhaul.launcher.cli", "verify", "--json", str(tmp_path / "verdicts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    text = (tmp_path / "verdicts.json").read_text()
    assert json.loads(text)
    for name in {*MIXERS, *EXCHANGES, *ENGINES}:
        assert f'"{name}"' in text, f"no cell of the default matrix has {name}"
