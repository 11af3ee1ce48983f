"""The feature job on Ray: joined by key, resumable, whole shards only, killed workers. About 40 s; one Ray."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import features, ingest, latents, parts
from pipelines.ray_pool import ActorPool, Resources, ray_session
from unicom_dist.config import storage
from unicom_dist.config.errors import ConfigError, DataError, Preempted, PreflightError
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import read_npy, to_tensor
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import Shard, ShardWriter
from unicom_dist.models.encoders import EncodedImage, build_encoder, encoder_fingerprint
from unicom_dist.models.encoders.random import RandomEncoder
from unicom_dist.testing.awkward import awkward_pictures
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights

SHARE = Resources(workers=2, threads=1)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(SHARE):
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module
        yield


def make_config(folder: Path) -> Config:
    return tiny_config(folder, features={"workers": 2}, data={"max_bad_fraction": 0.3})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ingested pictures."""
    folder = tmp_path_factory.mktemp("images")
    write_tiny_assets(folder, pictures=24)
    ingest.run(make_config(folder), workers=1)
    return folder


@pytest.fixture(scope="module")
def encoded(session: None, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ingested pictures and their features."""
    folder = tmp_path_factory.mktemp("encoded") / "copy"
    shutil.copytree(images, folder)
    features.run(make_config(folder))
    return folder


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Config:
    """Pictures without features, in a folder of the test's own."""
    shutil.copytree(images, tmp_path / "copy")
    return make_config(tmp_path / "copy")


@pytest.fixture
def done(encoded: Path, tmp_path: Path) -> Config:
    """Pictures with features, in a folder of the test's own."""
    shutil.copytree(encoded, tmp_path / "copy")
    return make_config(tmp_path / "copy")


def tars(config: Config) -> list[Path]:
    return sorted(Path(config.data.path).rglob("*.random.tar"))


def bytes_of(config: Config) -> dict[str, bytes]:
    return {path.name + path.parent.name: path.read_bytes() for path in tars(config)}


def test_features_are_the_encoders_and_joined_by_key(done: Config) -> None:
    config = done
    encoder = build_encoder(config.encoder)
    expected = {"random": encoder_fingerprint(config.encoder)}
    total = 0
    for name in ("train", "heldout"):
        folder = Path(config.data.path) / name
        joined = ShardSet(folder, {"random": folder}, expect_fingerprint=expected)
        total += len(joined)
        for number in range(len(joined)):
            sample = joined[number]
            stored = read_npy(sample.parts["random"]["features.npy"], sample.key)
            image = Image.open(io.BytesIO(bytes(sample.parts[""]["webp"])))
            encoded = encoder.encode([encoder.preprocess(image)])[0]
            assert bytes(sample.parts["random"]["json"]) == b'{"grid": [4, 4]}'
            np.testing.assert_array_equal(stored, encoded.features.astype(np.float16))
    assert total == 24
    assert features.verify(config) == []
    assert [(row["set"], row["done"] == row["shards"]) for row in features.status(config)] == [
        ("train", True),
        ("heldout", True),
    ]


def test_a_second_run_does_nothing_and_a_lost_shard_alone_is_made_again(
    done: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = done
    before = bytes_of(config)
    lost, *others = tars(config)
    stamps = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    lost.with_name(lost.name + ".4711.tmp").write_bytes(b"left by a killed writer")
    assert sum(row["shards"] - row["done"] for row in features.status(config)) == 1
    features.run(config)
    assert bytes_of(config) == before
    assert {path: path.stat().st_mtime_ns for path in others} == stamps
    assert not list(Path(config.data.path).rglob("*.tmp"))
    monkeypatch.setattr(features, "_encode", lambda *_: pytest.fail("nothing was to be done"))
    features.run(config)


def test_an_interrupted_job_continues_after_its_finished_shards(
    session: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []

    def record_one(ledger: Any, task: Any, *rest: Any) -> None:
        if recorded:
            raise KeyboardInterrupt
        recorded.append(task.name)
        parts.record(ledger, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(features, "record", record_one)
        with pytest.raises(KeyboardInterrupt):
            features.run(config)
    assert sum(row["done"] for row in features.status(config)) == 1
    assert not list(Path(config.data.path).rglob("manifest.random.json"))
    finished = Path(config.data.path) / f"{recorded[0]}.random.tar"
    stamp = finished.stat().st_mtime_ns
    features.run(config)
    assert finished.stat().st_mtime_ns == stamp
    assert features.verify(config) == []


def test_features_of_another_encoder_are_refused_and_both_are_named(done: Config) -> None:
    config = done
    other = config.model_copy(update={"encoder": config.encoder.model_copy(update={"image_px": 64})})
    with pytest.raises(DataError) as caught:
        features.run(other)
    assert encoder_fingerprint(config.encoder) in caught.value.what
    assert encoder_fingerprint(other.encoder) in caught.value.what


def spoil(config: Config, count: int) -> None:
    """Rewrite the first training shard with `count` damaged pictures."""
    folder = Path(config.data.path) / "train"
    manifest = Manifest.read(folder)
    shard = Shard(folder / manifest.shards[0].name)
    samples = [(key, {name: bytes(content) for name, content in shard[i].items()}) for i, key in enumerate(shard.keys)]
    with ShardWriter(folder / manifest.shards[0].name) as writer:
        for number, (key, members) in enumerate(samples):
            writer.write(key, members | ({"webp": b"damaged"} if number < count else {}))
    manifest.shards[0] = writer.entry
    manifest.write(folder)


def test_damaged_pictures_are_left_out_and_named(done: Config) -> None:
    config = done
    spoil(config, 2)
    train = features.run(config)[0]
    keys = Shard(Path(config.data.path) / "train" / "pictures-000000.tar").keys
    assert set(train.skipped) == set(keys[:2])
    assert features.verify(config) == []
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 0.01})})
    with pytest.raises(DataError, match="2 of 24 images could not be used"):
        features.run(strict)


def test_an_empty_shard_is_named_and_the_others_are_kept(config: Config, session: None) -> None:
    empty = min((Path(config.data.path) / "train").glob("*.tar"))
    content = empty.read_bytes()
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{empty.name} is empty \(0 bytes\)"):
        features.run(config)
    assert not list(Path(config.data.path).rglob("*.tmp"))
    empty.write_bytes(content)
    features.run(config)
    assert features.verify(config) == []


def test_verify_finds_changed_bytes(done: Config) -> None:
    config = done
    path = tars(config)[0]
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert any("differ from the manifest" in problem for problem in features.verify(config))


def test_no_space_no_permission_and_no_images_are_said_before_ray_starts(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(features, "_encode", lambda *_: pytest.fail("started"))
    with monkeypatch.context() as patch:
        patch.setattr(parts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(PreflightError, match="GB free"):
            features.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(storage.tempfile, "NamedTemporaryFile", _refuse)
        with pytest.raises(PreflightError, match="cannot write"):
            features.run(config)
    empty = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "none")})})
    with pytest.raises(DataError, match="no shard set"):
        features.run(empty)
    wrong = config.model_copy(update={"encoder": config.encoder.model_copy(update={"kind": "siglip2", "path": "."})})
    with pytest.raises(ConfigError, match=r"encoder\.path"):
        features.run(wrong)


def _refuse(*, dir: Path, prefix: str) -> None:
    raise OSError(30, "Read-only file system", str(dir / prefix))


def test_latents_on_ray_equal_latents_in_this_process(done: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = done
    write_tiny_weights(config)
    latents.run(config)
    folder = Path(config.run_dir) / "latents"
    here = {path.name: path.read_bytes() for path in folder.rglob("*.latent.tar")}
    stats = (folder / "stats.json").read_bytes()
    for path in folder.rglob("*.latent.tar"):
        path.unlink()
    monkeypatch.setattr(latents, "IMAGES_PER_WORKER", 1)
    latents.run(config)
    assert {path.name: path.read_bytes() for path in folder.rglob("*.latent.tar")} == here
    assert (folder / "stats.json").read_bytes() == stats


@dataclass(frozen=True)
class Task:
    name: str
    folder: str
    kills: int = 0
    error: str = ""


class Worker:
    """Writes one shard per task; dies or fails in the middle as often as the task says."""

    def process(self, task: Task, count: Callable[[int], None]) -> int:
        with ShardWriter(Path(task.folder) / f"{task.name}.tar") as writer:
            writer.write("first", {"txt": b"x"})
            marks = Path(task.folder) / f"{task.name}.killed"
            killed = len(marks.read_text()) if marks.exists() else 0
            if killed < task.kills:
                marks.write_text("x" * (killed + 1))
                os.kill(os.getpid(), 9)
            if task.error == "data":
                raise DataError("what", "why", "remedy")
            if task.error:
                raise RuntimeError(task.error)
            writer.write("second", {"txt": b"y"})
        return len(writer)


def run(tasks: list[Task]) -> dict[str, int]:
    with ActorPool(Worker, SHARE) as pool:
        return {task.name: result for task, result in pool.run(tasks, lambda _: None)}


def test_a_killed_worker_is_replaced_and_its_shard_made_whole(session: None, tmp_path: Path) -> None:
    tasks = [Task("a", str(tmp_path)), Task("b", str(tmp_path), kills=2), Task("c", str(tmp_path), kills=1)]
    assert run(tasks) == {"a": 2, "b": 2, "c": 2}
    for name in "abc":
        assert Shard(tmp_path / f"{name}.tar").keys == ["first", "second"]


def test_an_actor_killed_while_it_writes_features_changes_no_byte(
    config: Config, encoded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[str] = []

    def kill_the_first_writer() -> None:
        while not killed and not over.is_set():
            for path in Path(config.data.path).rglob("*.random.tar.*.tmp"):
                os.kill(int(path.name.split(".")[-2]), signal.SIGKILL)  # the writer's process id
                killed.append(path.name)
                return

    over = threading.Event()
    killer = threading.Thread(target=kill_the_first_writer)
    killer.start()
    try:
        with caplog.at_level("WARNING", "pipelines"):
            features.run(config)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1
    assert any("the worker was killed" in line for line in caplog.messages)
    assert bytes_of(config) == bytes_of(make_config(encoded))
    assert not list(Path(config.data.path).rglob("*.tmp"))


def test_a_shard_that_always_kills_its_worker_ends_the_job(session: None, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="b: its worker was killed 3 times"):
        run([Task("b", str(tmp_path), kills=99)])
    assert not (tmp_path / "b.tar").exists()


def test_errors_of_workers_reach_the_user_as_they_are(session: None, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run([Task("a", str(tmp_path), error="data")])
    assert (caught.value.what, caught.value.why, caught.value.remedy) == ("what", "why", "remedy")
    with pytest.raises(DataError, match="a could not be made") as caught:
        run([Task("a", str(tmp_path), error="broken pipe of thoughts")])
    assert "broken pipe of thoughts" in caught.value.why
    assert not list(tmp_path.glob("*.tar"))


def test_ray_listens_on_the_loopback_address_only(session: None) -> None:
    import psutil

    listening = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            listening |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening, "Ray's own servers should be found"
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


class Poisoned(RandomEncoder):
    """Gives features that are not finite for the first picture of every batch."""

    def encode(self, batch: Sequence[Any]) -> list[EncodedImage]:
        first, *others = super().encode(batch)
        return [first._replace(features=first.features * np.float32(np.inf)), *others]


def process(folder: Path, encoder: Any) -> tuple[Shard, dict[str, str]]:
    """The awkward pictures through a worker of the job, four at a time; the features and what was left out."""
    with ShardWriter(folder / "a.tar") as writer:
        for name, picture in awkward_pictures().items():
            writer.write(name, {"png": picture.content, "json": b"{}"})
        writer.write("no-picture", {"json": b"{}"})
    task = parts.ShardTask("train/a", str(folder / "a.tar"), str(folder / "a.random.tar"), len(writer), "")
    result = features.FeatureWorker(encoder, 4, "float16", threads=2).process(task, lambda _: None)
    return Shard(folder / "a.random.tar"), result.skipped


@pytest.mark.parametrize("crop", ["none", "bucket"])
def test_every_kind_of_picture_is_encoded_or_named(tmp_path: Path, crop: str) -> None:
    config = tiny_config(tmp_path).encoder.model_copy(update={"crop": crop})
    shard, skipped = process(tmp_path, build_encoder(config))
    reasons = {name: picture.refusal for name, picture in awkward_pictures().items() if picture.refusal}
    reasons["no-picture"] = "no image"
    if crop == "bucket":
        reasons["very-wide"] = "20000 x 10 pixels: cut to 4:1"
    assert set(skipped) == set(reasons)
    assert all(reason in skipped[name] for name, reason in reasons.items())
    assert set(shard.keys) == {*awkward_pictures(), "no-picture"} - set(reasons)
    for number in range(len(shard)):
        stored = read_npy(shard.member(number, "features.npy"), shard.keys[number])
        rows, columns = json.loads(bytes(shard.member(number, "json")))["grid"]
        assert stored.shape == (rows * columns, 24)
        assert np.isfinite(stored.astype(np.float32)).all()
    turned = json.loads(bytes(shard.member(shard.keys.index("turned"), "json")))["grid"]
    assert turned == ([4, 4] if crop == "none" else [5, 3])


def test_features_that_are_not_finite_are_left_out_by_name(tmp_path: Path) -> None:
    shard, skipped = process(tmp_path, Poisoned(tiny_config(tmp_path).encoder))
    poisoned = {name for name, reason in skipped.items() if reason == "features are not finite in float16"}
    assert len(poisoned) >= 3
    assert not poisoned & set(shard.keys)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_precisions_round_trip_and_refuse_what_is_not_finite(dtype: str) -> None:
    values = np.array([[0.5, -3.25], [1e-3, 2.0]], np.float32)
    stored = features.store_as(values, dtype)
    assert stored is not None
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    torch.testing.assert_close(to_tensor(stored), expected, rtol=0, atol=0)
    assert features.store_as(np.array([[np.nan]], np.float32), dtype) is None
    assert (features.store_as(np.array([[1e6]], np.float32), dtype) is None) == (dtype == "float16")


def test_sigterm_ends_the_job_with_the_exit_code_for_requeueing(session: None, tmp_path: Path) -> None:
    tasks = [Task(name, str(tmp_path)) for name in "abcdef"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught, ActorPool(Worker, SHARE) as pool:
        for _ in pool.run(tasks, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            pass
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before


LOSES_RAY = """
import os, sys, time
import psutil
from pipelines.ray_pool import ActorPool, Resources, ray_session
from unicom_dist.config.errors import PreflightError

class Slow:
    def process(self, task, count):
        time.sleep(600)

class Named:
    name = "a"

def kill(_):
    for child in psutil.Process().children():
        if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
            child.kill()

share = Resources(1, 1)
try:
    with ray_session(share), ActorPool(Slow, share) as pool:
        list(pool.run([Named()], kill))
except PreflightError as error:
    print(error.what)
"""


def test_a_job_whose_ray_is_killed_ends_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES_RAY], capture_output=True, text=True, timeout=180, check=False, env=os.environ
    )
    assert done.stdout.strip().endswith("Ray on this machine has ended"), done.stdout + done.stderr
