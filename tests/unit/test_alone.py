"""What rank 0 does alone: the others wait for its end, its failure or its silence. Two threads in one process."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from unicom_dist.config.errors import DataError, HangError, PreflightError, UnicomError
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.train import alone as module
from unicom_dist.train.alone import alone


class Agreed(Mesh):
    """One of two ranks that need no process group to agree on a name."""

    def broadcast_object(self, value):
        return "attempt"


def rank(number: int) -> Mesh:
    return Agreed(number, 2, torch.device("cpu"))


def together(folder: Path, work, silence_s: float = 5.0) -> list[BaseException | None]:
    """What `alone` raised on each of two ranks."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(alone, rank(number), folder, "working", work, silence_s) for number in (0, 1)]
        return [call.exception(timeout=20) for call in calls]


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)


def test_the_others_return_when_the_work_is_done_however_long_it_takes(tmp_path):
    ended = []

    def work() -> None:
        time.sleep(1.0)
        ended.append(time.monotonic())

    assert together(tmp_path, work, silence_s=0.5) == [None, None]
    assert len(ended) == 1  # one of them did it
    assert time.monotonic() - ended[0] < 0.5


def test_what_an_earlier_piece_of_work_left_says_nothing(tmp_path):
    path = tmp_path / "logs" / "alone.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"attempt": "earlier", "done": True}))
    over = threading.Event()

    def work() -> None:
        time.sleep(0.3)
        over.set()

    assert together(tmp_path, work) == [None, None]
    path.write_text(json.dumps({"attempt": "earlier", "done": True}))
    with pytest.raises(HangError):  # rank 0 never begins: the others do not take what is there for its end
        alone(rank(1), tmp_path, "working", over.wait, 0.2)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DataError("what", "why", "remedy", "docs/x.md"), DataError, "what"),
        (OSError(28, "No space left on device", "/some/file"), PreflightError, "/some/file"),
        (OSError("disk"), UnicomError, "OSError('disk')"),
    ],
)
def test_a_failure_reaches_every_rank_with_its_reason(tmp_path, error, kind, words):
    def work() -> None:
        raise error

    first, second = together(tmp_path, work)
    assert first is error
    assert type(second) is kind
    assert words in second.what
    assert "rank 0 was working, the others waited" in second.why
    if kind is DataError:
        assert (second.exit_code, second.remedy, second.docs) == (4, "remedy", "docs/x.md")


@pytest.mark.parametrize("left", [None, "", '{"attempt": "attempt", "beat": 3}'], ids=["nothing", "empty", "a beat"])
def test_silence_ends_the_wait_in_bounded_time(tmp_path, left):
    if left is not None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "alone.json").write_text(left)
    began = time.monotonic()
    with pytest.raises(HangError, match=r"nothing was seen of rank 0 for 0\.3 s while it was computing"):
        alone(rank(1), tmp_path, "computing", lambda: None, 0.3)
    assert 0.3 <= time.monotonic() - began < 2


def test_rank_0_fails_where_it_cannot_tell_the_others_of_its_end(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError):  # they would wait for `silence_s` and call it a hang
        alone(rank(0), tmp_path, "working", lambda: None, 600)


def test_one_process_just_works(tmp_path):
    done = []
    alone(Mesh(0, 1, torch.device("cpu")), tmp_path, "working", lambda: done.append(1), 0.1)
    assert done == [1]
    assert not list(tmp_path.iterdir())
