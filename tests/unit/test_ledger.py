"""The ledger of a job: what survives a crash, and who may write. One process."""

from pathlib import Path

import pytest

from pipelines.ledger import Ledger, read_ledger
from unicom_dist.config.errors import PreflightError


def test_the_newest_done_entry_of_a_shard_counts(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.add("a", "done", bytes=1)
        ledger.add("a", "done", bytes=2)
        ledger.add("b", "failed")
    assert {name: entry["bytes"] for name, entry in read_ledger(tmp_path / "ledger.jsonl").items()} == {"a": 2}


def test_a_line_cut_off_by_a_crash_is_ignored_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add("a", "done")
        ledger.add("b", "done")
    path.write_bytes(path.read_bytes()[:-7])
    with Ledger(path) as ledger:
        assert set(ledger.done) == {"a"}
        ledger.add("c", "done")
    assert set(read_ledger(path)) == {"a", "c"}


def test_a_second_job_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl"), pytest.raises(PreflightError, match="another job"):
        Ledger(tmp_path / "ledger.jsonl")
    Ledger(tmp_path / "ledger.jsonl").__exit__(None, None, None)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="file/ledger"):
        Ledger(tmp_path / "file" / "ledger.jsonl")
