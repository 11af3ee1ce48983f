"""env.json: what it keeps and what it must not. One process, seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unicom_dist.tracking.env import ENV_FILE, read_env, write_env


def test_every_start_is_kept(tmp_path: Path) -> None:
    write_env(tmp_path, ["unicom", "train", "a"])
    write_env(tmp_path, ["unicom", "train", "b"])
    assert [start["command"][-1] for start in read_env(tmp_path)["starts"]] == ["a", "b"]
    assert read_env(tmp_path)["packages"]["torch"]


def test_secrets_of_the_environment_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    write_env(tmp_path, [])
    text = (tmp_path / ENV_FILE).read_text()
    assert "s3cret" not in text
    assert json.loads(text)["variables"]["OMP_NUM_THREADS"] == "3"


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text("{")
    assert read_env(tmp_path) == {}
    write_env(tmp_path, [])
    assert len(read_env(tmp_path)["starts"]) == 1


def test_collecting_imports_no_torch() -> None:
    code = "import sys; from unicom_dist.tracking.env import collect_env; collect_env(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
