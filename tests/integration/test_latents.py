"""Features into latents and their statistics, in one process. About 10 s with the one feature job it needs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import ingest, latents
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.loader import PriorLoader
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import read_npy, to_tensor, write_npy
from unicom_dist.data.samples import grid_positions
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import Shard, ShardWriter
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_codec, write_tiny_weights
from unicom_dist.tracking.metrics import read_metrics


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
    latents.run(config)
    run = Path(config.run_dir)
    files = sorted((run / "latents").rglob("*.latent.tar"))
    stamps = [path.stat().st_mtime_ns for path in files]
    before = [path.read_bytes() for path in files]
    latents.run(config)
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
