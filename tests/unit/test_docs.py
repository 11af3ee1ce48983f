"""The documentation names what exists: files, anchors, make targets. One process, under a second."""

import re
from pathlib import Path

import pytest

from unicom_dist.config.schema import Config

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/results/README.md"]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in NAMES)]
SOURCES = [path for folder in ("unicom_dist", "pipelines") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_pages_that_errors_point_to_exist():
    named = {name for path in SOURCES for name in re.findall(r"docs/[a-z0-9-]+\.md", path.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_section_of_the_configuration_has_its_anchor():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in Config.model_fields if f'<a id="{name}"></a>' not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)\b(?! python)", "\n".join(_code(page))))
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_every_benchmark_has_its_row():
    rows = re.findall(r"^\| `(bench_\w+\.py)` \|", (ROOT / "benchmarks" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert rows == sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))


def test_continuous_integration_runs_the_tests():
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("exec make test")


def _code(page: Path) -> list[str]:
    """The parts of a page in backticks: blocks and spans."""
    return re.findall(r"```.*?```|`[^`]+`", page.read_text(encoding="utf-8"), re.DOTALL)
