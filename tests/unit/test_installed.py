"""What a wheel would hold, by setuptools' own reading of setup.cfg: nothing is built. One process, under a second."""

from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[2]
FOLDERS = ("unicom_dist", "pipelines", "recipes")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths of the wheel, of packages and their data."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    data = {f"{source}/{name}" for _, source, _, names in build.data_files for name in names}
    return data | {path for _, _, path in build.find_all_modules()}


def test_a_wheel_holds_every_module_and_every_recipe(installed: set[str]) -> None:
    there = {str(path.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()}
    needed = {path for path in there if path.endswith((".py", ".yaml", "py.typed"))}
    assert "recipes/unicom_7b/sft.yaml" in needed
    assert installed == needed
