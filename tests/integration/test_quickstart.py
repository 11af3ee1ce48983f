"""The commands of `make quickstart` in a row on tiny pictures, once more, and killed in the middle of a shard.

Ray, two ZeRO-3 ranks, MLflow on a sqlite file: about a minute. Only the networks that judge pictures are cheap ones.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from hashlib import sha256
from io import StringIO
from pathlib import Path

import psutil
import pytest
from PIL import Image

from unicom_dist.cli.main import run
from unicom_dist.config.load import RECIPES
from unicom_dist.evaluate.heldout import to_unit
from unicom_dist.evaluate.quick import Networks
from unicom_dist.testing.tiny import write_tiny_assets
from unicom_dist.tracking.status import read_status

MAKEFILE = Path(__file__).parents[2] / "Makefile"
RECIPE = f"""
base: {RECIPES}/tiny.yaml
run_dir: runs/small
data: {{source: pictures, path: data/small}}
parallel: {{nproc: 2, zero_stage: 3}}
tracking: {{mlflow: true}}
"""
TRAINED = ("codec", "alignment", "pretrain", "continue", "sft")
CHEAP = Networks(lambda pictures: to_unit(pictures).flatten(1), lambda a, b: (a - b).square().flatten(1).mean(1))


def commands() -> dict[str, list[str]]:
    """Those of the Makefile's pipeline after `fetch`, by the first word of their titles."""
    found = re.findall(r"call phase,\d/7 (\w+).*?,\$\(BIN\)/unicom (.*)\)$", MAKEFILE.read_text(), re.MULTILINE)
    lines = {title: line.replace("$(1)", "small.yaml").replace("$(2)", "runs/small") for title, line in found}
    return {title: line.split() for title, line in lines.items() if title != "fetch"}


COMMANDS = commands()


def unicom(title: str) -> str:
    """What a command printed. It must end well."""
    with redirect_stdout(StringIO()) as printed:
        assert run(COMMANDS[title]) == 0
    return printed.getvalue()


def made() -> list[Path]:
    """Files of data, features, weights, latents and pictures; not the ledgers, which say when."""
    folders = (Path("data"), *(Path("runs/small") / name for name in ("weights", "latents", "pictures")))
    found = (path for folder in folders for path in folder.rglob("*"))
    return [path for path in found if path.is_file() and not path.name.startswith("ledger")]


def digests() -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in made()}


def mlflow_runs() -> dict[str, tuple[str, str]]:
    """By name: the id of a run and that of its parent."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{Path('runs/mlflow.db').resolve()}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.search_runs([item.experiment_id for item in client.search_experiments()])
    assert {item.info.status for item in found} == {"FINISHED"}
    return {item.info.run_name: (item.info.run_id, item.data.tags.get("mlflow.parentRunId", "")) for item in found}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each command printed. The tests of this file are in the folder that the commands were given in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("quickstart"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(Networks, "load", lambda *_: CHEAP)
        write_tiny_assets(Path())
        Path("small.yaml").write_text(RECIPE)
        yield {title: unicom(title) for title in COMMANDS}


def test_everything_that_is_to_be_looked_at_is_there(printed: dict[str, str]) -> None:
    assert list(COMMANDS) == ["ingest", "encode", "train", "draw", "evaluate", "report"]
    for name in ("train", "heldout"):
        for folder, part in (("data/small", ""), ("data/small", ".random"), ("runs/small/latents", ".latent")):
            assert Path(folder, name, f"manifest{part}.json").is_file()
    for stage in TRAINED:
        assert Path("runs/small/weights", stage, "model.safetensors").is_file()
        assert list(Path("runs/small/samples", stage).glob("*.png"))
    for name in ("grid.png", "reconstructions.png"):
        path = Path("runs/small/pictures", name)
        assert Image.open(path).convert("RGB").getcolors(1 << 20)
        assert str(path) in printed["draw"]
    status = read_status("runs/small")
    assert status is not None
    assert (status.state, status.stage, status.exit_code) == ("done", "sft", 0)


def test_every_figure_stands_beside_what_it_must_beat(printed: dict[str, str]) -> None:
    rows = json.loads(Path("runs/small/eval.json").read_text())["rows"]
    assert {"PSNR (dB)", "flow loss", "caption loss (nats/token)", "prompt accuracy, top 1"} <= {
        r["metric"] for r in rows
    }
    for row in rows:
        assert row["metric"] in printed["evaluate"]
        assert row["baselines"]["trivial"]["name"] in printed["evaluate"]
        if not row["metric"].startswith("judge on"):  # the bound that the codec sets, not a model's figure
            assert isinstance(row["baselines"]["untrained"], float)


def test_the_report_shows_curves_pictures_and_figures_without_the_network(printed: dict[str, str]) -> None:
    html = Path("runs/small/report.html").read_text()
    assert not re.findall(r"""(?:src|href|srcset|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", html)
    assert "data:image/" in html
    assert all(text in html for text in ("<svg", "caption loss", *TRAINED))


def test_mlflow_has_a_run_with_one_nested_in_it_for_each_stage(printed: dict[str, str]) -> None:
    assert "MLflow is up to date" in printed["report"]
    runs = mlflow_runs()
    parent, above = runs.pop("small")
    assert above == ""
    assert {name: of for name, (_, of) in runs.items()} == dict.fromkeys((*TRAINED, "latents"), parent)


def test_the_same_commands_once_more_change_no_file_and_say_so(printed: dict[str, str]) -> None:
    before, runs = digests(), mlflow_runs()
    again = {title: unicom(title) for title in COMMANDS}
    assert digests() == before
    assert mlflow_runs() == runs
    assert again["ingest"].count("already there") == again["encode"].count("already there") == 2
    assert re.findall(r"(\w+): finished before, skipped", again["train"]) == list(TRAINED)
    assert re.findall(r"(\w+): latents of .* already there", again["train"]) == ["train", "heldout"]
    assert all("settings" in again[title] and "skipped" in again[title] for title in ("draw", "evaluate"))
    assert "MLflow is up to date" in again["report"]


KILLED = """
import os, signal, time
from pipelines import {job} as job
from unicom_dist.cli.main import main

DRIVER, build = os.getpid(), getattr(job, "build_worker", None)

class Killing(job.ShardWriter):
    def write(self, key, members):
        super().write(key, members)
        if "-000001." in self.path.name and len(self) == 3:
            os.kill(DRIVER, signal.SIGKILL)
            time.sleep(600)  # an actor of Ray; it must not outlive its driver

def build_worker(*arguments):
    job.ShardWriter = Killing  # where an actor is another process
    return build(*arguments)

job.ShardWriter, job.build_worker = Killing, build_worker
main()
"""


def left_of(group: int) -> list[str]:
    """Names of the processes of a group that are still running."""
    names = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


@pytest.mark.parametrize(
    ("job", "title", "lost"),
    [
        ("ingest", "ingest", "data/"),
        pytest.param("features", "encode", "random", marks=pytest.mark.slow),  # starts Ray twice
        ("latents", "train", "/latents/"),
    ],
)
def test_a_command_killed_in_the_middle_of_a_shard_is_finished_by_the_next(
    printed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, title: str, lost: str
) -> None:
    """`lost`: what the paths of the files that the command makes, or that are made from these, have in common."""
    whole = {name: digest for name, digest in digests().items() if job != "ingest" or "random" not in name}
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for path in [*made(), *Path().rglob("ledger.*")]:
        if lost in str(path):
            path.unlink()
    killed = subprocess.Popen([sys.executable, "-c", KILLED.format(job=job), *COMMANDS[title]], start_new_session=True)
    assert killed.wait(timeout=240) == -signal.SIGKILL
    (left,) = digests().keys() - whole.keys()
    assert re.search(r"-000001\..*\.tmp$", left)
    deadline = time.monotonic() + 120  # the agents of Ray look for it now and then
    while left_of(killed.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_of(killed.pid) == []
    unicom(title)
    assert digests() == whole
