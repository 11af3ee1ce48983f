"""`unicom train` with an encoder that learns: continued by one process and by two, exported, used by what follows.

The encoder is read from a whole published SigLIP2, text tower included. Three starts of ranks, a minute on two cores.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import latents
from pipelines.features import FeatureWorker
from pipelines.parts import SETS, part_sets
from unicom_dist.checkpoint.saved import Checkpoint, latest
from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import DataError
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.models.encoders import build_encoder, encoder_fingerprint
from unicom_dist.sample.loading import load_codec
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_siglip2 import write_tiny_siglip2
from unicom_dist.tracking.metrics import read_metrics

STEPS, CUT = 6, 3
TRAINED = 3e-5  # relative; as between one process and two of any codec stage
LEAST = 1e-2  # what it is relative to at least: the keys' biases, on which no loss depends, are rounding alone
ENCODER = "encoder.network."


def configure(folder: Path, run: str) -> Config:
    stage = {"steps": STEPS, "checkpoint_every": CUT, "lr": 1e-2, "eps": 1e-4, "ema": 0.5}
    config = tiny_config(
        folder,
        run_dir=str(folder / "runs" / run),
        encoder={"kind": "siglip2", "path": str(folder / "siglip2"), "max_patches": 9},
        codec={"encoder_trainable": True, "distill_weight": 1.0},
        stages={"codec": stage},
    )
    return config.model_copy(update={"stages": [config.stage("codec"), config.stage("latents")]})


def encode(config: Config) -> None:
    """The tiny sets with the encoder's own features, as `unicom features run` writes them, in this process."""
    write_tiny_sets(config)
    kind, data = config.encoder.kind, Path(config.data.path)
    worker = FeatureWorker(build_encoder(config.encoder, "cpu"), 8, config.features.dtype, 1)
    for part in part_sets(data, SETS, "", kind, data):
        shards = [worker.process(task, lambda count: None).entry for task in part.tasks]
        Manifest(part=kind, fingerprint=encoder_fingerprint(config.encoder), shards=shards).write(part.folder)


def train(config: Config, *further: str) -> int:
    """`unicom train` of the codec stage; its exit status."""
    recipe = write_config(Path(config.run_dir).with_suffix(".recipe"), config, {})
    return unicom(["train", str(recipe), "--stage", "codec", *further])


def last(config: Config) -> Checkpoint:
    found = latest(Path(config.run_dir) / "checkpoints" / "codec")
    assert found is not None
    return Checkpoint(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and what a crash after its third step would have left of it, continued in two layouts."""
    folder = tmp_path_factory.mktemp("encoder-learns")
    write_tiny_assets(folder)
    write_tiny_siglip2(folder / "siglip2")
    whole = configure(folder, "whole")
    encode(whole)
    assert train(whole) == 0
    for run, further in (("one", ()), ("two", ("parallel.nproc=2", "parallel.zero_stage=3"))):
        config = configure(folder, run)
        kept = Path("checkpoints") / "codec" / f"step-{CUT:06d}"
        shutil.copytree(Path(whole.run_dir) / kept, Path(config.run_dir) / kept)
        assert train(config, *further) == 0
        first = min(record.step for record in read_metrics(config.run_dir) if record.kind == "train")
        assert first == CUT + 1
    return folder


pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def test_the_encoder_moves_and_is_held_to_its_stored_features(folder: Path) -> None:
    config = configure(folder, "whole")
    published, learnt = load_file(folder / "siglip2" / "model.safetensors"), last(config).tensors("weight")
    mine = {name.removeprefix(ENCODER): tensor for name, tensor in learnt.items() if name.startswith(ENCODER)}
    still = [name for name, tensor in mine.items() if torch.equal(tensor, published[f"vision_model.{name}"])]
    assert mine
    assert [name for name in still if "head" not in name] == []  # the pooling head makes no tokens
    distances = [r.values["loss/distill"] for r in read_metrics(config.run_dir) if r.kind == "train"]
    assert distances[0] < 1e-5 < distances[-1]  # in the first step it says what is stored, but for float16


def test_continued_it_ends_as_it_would_have(folder: Path) -> None:
    whole, one, two = (last(configure(folder, run)) for run in ("whole", "one", "two"))
    assert whole.step == one.step == two.step == STEPS
    for kind in ("weight", "ema"):
        expected, same, moved = (checkpoint.tensors(kind) for checkpoint in (whole, one, two))
        assert any(name.startswith(ENCODER) for name in expected)
        for name, tensor in expected.items():
            assert torch.equal(same[name], tensor), name
            assert (moved[name] - tensor).abs().max() <= TRAINED * max(float(tensor.abs().max()), LEAST), name


def test_its_average_is_exported_and_what_follows_uses_it(folder: Path) -> None:
    config = configure(folder, "two")
    run_dir = Path(config.run_dir)
    exported, average = load_file(run_dir / "encoder" / "model.safetensors"), last(config).tensors("ema")
    for name, tensor in exported.items():
        assert torch.equal(tensor, average[ENCODER + name]), name
    codec = load_codec(run_dir / "weights" / "codec")
    assert codec.encoder.path == str(run_dir / "encoder")
    assert (
        unicom(["sample", str(run_dir), "--reconstruct", str(folder / "pictures"), "--out", str(folder / "out")]) == 0
    )
    with pytest.raises(DataError, match=r"(?s)features with fingerprint .*encoder\.path=.*/two/encoder"):
        latents.run(config)
    learnt = config.model_copy(update={"encoder": codec.encoder})
    encode(learnt)
    latents.run(learnt)
    assert Manifest.read(run_dir / "latents" / "train", "latent").samples == 24
    assert (run_dir / "latents" / "stats.json").is_file()
