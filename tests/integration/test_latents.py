"""Features into latents and their statistics, in one process. About 10 s with the one feature job it needs."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import ingest, latents
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.decode import decode_image
from unicom_dist.data.loader import CodecLoader, PriorLoader
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import read_npy, to_tensor, write_npy
from unicom_dist.data.samples import grid_positions
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import Shard, ShardWriter
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.encoders import build_encoder, encoder_fingerprint
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_codec, write_tiny_weights
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.pipeline import note_latents


def write_features(config: Config) -> None:
    """Random features of 3 to 6 tokens beside every image shard."""
    for name in ("train", "heldout"):
        folder = Path(config.data.path) / name
        manifest = Manifest(part="random", fingerprint=encoder_fingerprint(config.encoder))
        for entry in Manifest.read(folder).shards:
            with ShardWriter(folder / part_name(entry.name, "random")) as writer:
                for key in Shard(folder / entry.name).keys:
                    rng = np.random.default_rng(list(key.encode()))
                    n = int(rng.integers(3, 7))
                    tokens = rng.standard_normal((n, 24)).astype(np.float16)
                    grid = json.dumps({"grid": [1, n]}).encode()
                    writer.write(key, {"features.npy": write_npy(tokens), "json": grid})
            manifest.shards.append(writer.entry)
        manifest.write(folder)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny_assets(tmp_path, pictures=20)
    config = tiny_config(tmp_path)
    ingest.run(config, workers=1)
    write_features(config)
    write_tiny_weights(config)
    return config


def joined(config: Config, name: str) -> ShardSet:
    folder = Path(config.data.path) / name
    return ShardSet(folder, {"random": folder, "latent": Path(config.run_dir) / "latents" / name})


def test_latents_are_the_compressors_and_statistics_those_of_the_training_set(config: Config) -> None:
    latents.run(config)
    codec = tiny_codec(config)
    tensors = []
    for name in ("train", "heldout"):
        together = joined(config, name)
        for number in range(len(together)):
            sample = together[number]
            tokens = to_tensor(read_npy(sample.parts["random"]["features.npy"], sample.key)).float()
            expected = codec.encode(tokens[None])[0]
            stored = to_tensor(read_npy(sample.parts["latent"]["latent.npy"], sample.key))
            assert stored.dtype == torch.float16
            torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)
            assert bytes(sample.parts["latent"]["json"]) == bytes(sample.parts["random"]["json"])
            if name == "train":
                tensors.append(expected)
    reference = LatentStats.from_tensors(tensors)
    run = Path(config.run_dir)
    stats = LatentStats.from_json(json.loads((run / "latents" / "stats.json").read_text()))
    torch.testing.assert_close(stats.mean, reference.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.std, reference.std, rtol=1e-4, atol=1e-5)
    assert json.loads((run / "weights" / "codec" / "config.json").read_text())["stats"] == stats.to_json()

    one = config.model_copy(update={"codec": config.codec.model_copy(update={"latent_scale": "shared"})})
    latents.run(one)  # only the statistics change
    shared = LatentStats.from_json(json.loads((run / "latents" / "stats.json").read_text()))
    assert torch.equal(shared.mean, stats.mean)
    assert shared.std.unique().numel() == 1
    torch.testing.assert_close(shared.std.square().mean(), stats.std.square().mean())


@pytest.mark.parametrize(
    "keys", [{"spatial": "pool"}, {"spatial": "resampler", "bottleneck": "tanh"}, {"bottleneck": "kl"}]
)
def test_latents_of_every_variant_are_read_by_the_prior_at_their_own_grid(tmp_path: Path, keys: dict[str, str]) -> None:
    """The statistics are those of the latents as they are: of a posterior the means."""
    write_tiny_assets(tmp_path, pictures=20)
    config = tiny_config(tmp_path, codec={"compressor": keys})
    ingest.run(config, workers=1)
    write_features(config)
    write_tiny_weights(config)
    latents.run(config)
    codec, run = tiny_codec(config), Path(config.run_dir)
    stats = LatentStats.from_json(json.loads((run / "latents" / "stats.json").read_text()))
    together, found = joined(config, "train"), []
    for number in range(len(together)):
        sample = together[number]
        tokens = to_tensor(read_npy(sample.parts["random"]["features.npy"], sample.key)).float()
        (rows, columns) = json.loads(bytes(sample.parts["latent"]["json"]))["grid"]
        stored = to_tensor(read_npy(sample.parts["latent"]["latent.npy"], sample.key))
        assert (rows, columns) == ((1, len(tokens)) if "spatial" not in keys else (1, -(-len(tokens) // 2)))
        found.append(codec.encode(tokens[None], None, grid_positions(1, len(tokens))[None])[0])
        torch.testing.assert_close(stored.float(), found[-1], rtol=2e-3, atol=2e-3)
    reference = LatentStats.from_tensors(found)
    torch.testing.assert_close(stats.mean, reference.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.std, reference.std, rtol=1e-4, atol=1e-5)
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    numbers = {together.key(n): n for n in range(len(together))}
    with PriorLoader(config, config.stage("pretrain"), vocabulary, stats) as loader:
        batch = loader.next_step()[0]
    for row, key in enumerate(batch.keys):
        if batch.tasks[row] == "text_to_image":
            mine = batch.latent_sample == row
            expected = stats.normalise(found[numbers[key]])
            torch.testing.assert_close(batch.latents[mine], expected, rtol=1e-2, atol=1e-2)
            assert torch.equal(batch.latent_grid[mine], grid_positions(1, len(expected)))


def test_moments_merge_to_those_of_the_union() -> None:
    rows = torch.randn(50, 3, dtype=torch.float64) * 4 + 100
    pieces = [rows[:7], rows[7:7], rows[7:31], rows[31:]]
    parts = [(len(p), p.mean(0), (p - p.mean(0)).square().sum(0)) for p in pieces]
    count, mean, moment = latents.merge_moments(parts)
    assert count == 50
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(moment / count, rows.var(0, correction=0))


def test_a_second_run_writes_nothing_and_another_codec_replaces_the_latents(config: Config) -> None:
    note = partial(note_latents, config)
    latents.run(config, note)
    run = Path(config.run_dir)
    files = sorted((run / "latents").rglob("*.latent.tar"))
    stamps = [path.stat().st_mtime_ns for path in files]
    before = [path.read_bytes() for path in files]
    latents.run(config, note)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    states = [(r.kind, r.stage, r.values["state"]) for r in read_metrics(run)]
    assert states == [("stage", "latents", "running"), ("stage", "latents", "done")]
    first = Manifest.read(run / "latents" / "train", "latent").fingerprint
    write_tiny_weights(config, dtype=torch.bfloat16)
    latents.run(config)
    assert Manifest.read(run / "latents" / "train", "latent").fingerprint != first
    assert all(path.read_bytes() != old for path, old in zip(files, before, strict=True))


def test_a_missing_or_damaged_codec_is_a_checkpoint_error(config: Config) -> None:
    folder = Path(config.run_dir) / "weights" / "codec"
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="does not hold a usable codec"):
        latents.run(config)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no exported codec"):
        latents.run(config)
    assert not list((Path(config.run_dir) / "latents").rglob("*.latent.tar"))


def test_features_of_another_encoder_than_the_codecs_are_refused(config: Config) -> None:
    path = Path(config.run_dir) / "weights" / "codec" / "config.json"
    content = json.loads(path.read_text()) | {"encoder_fingerprint": "another"}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        latents.run(config)
    assert encoder_fingerprint(config.encoder) in caught.value.what
    assert "another" in caught.value.why


def test_missing_features_are_named(config: Config) -> None:
    (Path(config.data.path) / "train" / "manifest.random.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.random\.json"):
        latents.run(config)


def rewrite(config: Config, changes: dict[str, dict[str, bytes]]) -> None:
    """Replace members of samples of the training features; the manifest follows."""
    folder = Path(config.data.path) / "train"
    manifest = Manifest.read(folder, "random")
    for number, entry in enumerate(manifest.shards):
        shard = Shard(folder / entry.name)
        samples = {key: {e: bytes(m) for e, m in shard[n].items()} for n, key in enumerate(shard.keys)}
        with ShardWriter(folder / entry.name) as writer:
            for key, members in samples.items():
                writer.write(key, {**members, **changes.get(key, {})})
        manifest.shards[number] = writer.entry
    manifest.write(folder)


def stored_latents(config: Config, name: str = "train") -> dict[str, bytes]:
    folder = Path(config.run_dir) / "latents" / name
    return {
        key: bytes(shard.member(number, "latent.npy"))
        for entry in Manifest.read(folder, "latent").shards
        for shard in [Shard(folder / entry.name)]
        for number, key in enumerate(shard.keys)
    }


def test_bad_features_are_left_out_by_name_and_do_not_touch_their_neighbours(config: Config) -> None:
    latents.run(config)
    before = stored_latents(config)
    nan = np.full((4, 24), np.nan, np.float16)
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"features.npy": write_npy(nan), "json": b'{"grid": [2, 2]}'}, "not finite"),
        ({"features.npy": write_npy(nan * 0 + np.inf), "json": b'{"grid": [2, 2]}'}, "not finite"),
        ({"json": b'{"grid": [9, 9]}'}, "expected [81, 24]"),
        ({"features.npy": write_npy(np.zeros((0, 24), np.float16)), "json": b'{"grid": [0, 0]}'}, "no grid"),
        ({"features.npy": write_npy(np.zeros((4, 23), np.float16)), "json": b'{"grid": [2, 2]}'}, "expected [4, 24]"),
        ({"features.npy": b"\x93NUMPY"}, "array cannot be read"),
        ({"json": b"{"}, "json member cannot be read"),
    ]
    keys = sorted(before)[: len(cases)]
    rewrite(config, {key: members for key, (members, _) in zip(keys, cases, strict=True)})
    with pytest.raises(DataError, match="7 of 20 images could not be used"):
        latents.run(config)
    tolerant = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 0.5})})
    latents.run(tolerant)
    skipped = Manifest.read(Path(config.run_dir) / "latents" / "train", "latent").skipped
    assert set(skipped) == set(keys)
    for key, (_, reason) in zip(keys, cases, strict=True):
        assert reason in skipped[key]
    after = stored_latents(config)
    assert set(after) == set(before) - set(keys)
    for key, content in after.items():
        values = to_tensor(read_npy(memoryview(content), key)).float()
        torch.testing.assert_close(
            values, to_tensor(read_npy(memoryview(before[key]), key)).float(), rtol=2e-3, atol=2e-3
        )


def test_an_interrupted_job_goes_on_after_its_finished_shards(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config.model_copy(update={"run_dir": str(tmp_path / "whole")})
    write_tiny_weights(whole)
    latents.run(whole)
    made: list[str] = []

    class Interrupted(ShardWriter):
        def close(self) -> object:
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(self.path.name)
            return super().close()

    with monkeypatch.context() as patch:
        patch.setattr(latents, "ShardWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            latents.run(config)
    folder = Path(config.run_dir) / "latents"
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*.latent.tar")}
    assert len(finished) == 2
    assert not list(folder.rglob("*.tmp"))
    latents.run(config)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    for name in ("train", "heldout"):
        assert stored_latents(config, name) == stored_latents(whole, name)
    assert (folder / "stats.json").read_bytes() == (tmp_path / "whole" / "latents" / "stats.json").read_bytes()


def test_latents_keep_the_ratio_of_the_picture_in_every_bucket(tmp_path: Path) -> None:
    aspect = {"codec": {"decoder": {"buckets": "aspect"}}, "encoder": {"crop": "bucket"}}
    write_tiny_assets(tmp_path)
    config = tiny_config(tmp_path, **aspect)
    sizes = [(32, 32), (64, 20), (20, 64), (30, 16)]
    write_tiny_sets(config, 12, feature_channels=24, sizes=sizes)
    encoder = build_encoder(config.encoder)
    for name in ("train", "heldout"):
        folder = Path(config.data.path) / name
        manifest = Manifest(part="random", fingerprint=encoder.fingerprint)
        for entry in Manifest.read(folder).shards:
            shard = Shard(folder / entry.name)
            with ShardWriter(folder / part_name(entry.name, "random")) as writer:
                for number, key in enumerate(shard.keys):
                    image = decode_image(shard.member(number, "webp"), key)
                    (item,) = encoder.encode([encoder.preprocess(image)])
                    grid = json.dumps({"grid": item.grid}).encode()
                    writer.write(key, {"features.npy": write_npy(item.features.astype(np.float16)), "json": grid})
            manifest.shards.append(writer.entry)
        manifest.write(folder)
    write_tiny_weights(config)
    latents.run(config)
    together = joined(config, "train")
    grids = [json.loads(bytes(together[n].parts["latent"]["json"]))["grid"] for n in range(12)]
    assert grids == [[4, 4], [2, 7], [7, 2], [3, 5]] * 3
    for number, (rows, columns) in enumerate(grids):
        sample = together[number]
        assert read_npy(sample.parts["latent"]["latent.npy"], sample.key).shape == (rows * columns, 4)
    other = config.model_copy(update={"encoder": config.encoder.model_copy(update={"crop": "none"})})
    with pytest.raises(DataError, match="fingerprint"):
        CodecLoader(other, config.stage("codec"), expect_fingerprint={"random": encoder_fingerprint(other.encoder)})
    with CodecLoader(config, config.stage("codec"), expect_fingerprint={"random": encoder.fingerprint}) as loader:
        for batch in loader.next_step():
            extent = (batch.grid.amax((0, 1)) + 1).tolist()
            height, width = batch.images.shape[-2:]
            assert abs(np.log(extent[1] / extent[0] * height / width)) < 0.5  # tokens and target: one ratio
