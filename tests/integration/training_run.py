"""A tiny recipe with shards, features and latents on disk, ready for `unicom_dist.train.pipeline.run`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.tasks import make_task


def tiny_run(folder: Path, feature_channels: int = 12, **overrides: Any) -> Config:
    """The tiny configuration below `folder`; its data is written on the first call."""
    config = tiny_config(folder, **overrides)
    if not (folder / "data").exists():
        write_tiny_assets(folder)
        write_tiny_sets(config, feature_channels=feature_channels)
        for name in ("train", "heldout"):
            manifest = Manifest.read(folder / "data" / name, "random")
            manifest.fingerprint = encoder_fingerprint(config.encoder)
            manifest.write(folder / "data" / name)
    return config


def write_stats(config: Config, *_: object) -> None:
    """In place of the latents stage: the latents are there already, only their statistics are not."""
    path = Path(config.run_dir) / "latents" / "stats.json"
    if path.exists():
        return
    channels = config.codec.compressor.channels
    stats = LatentStats(torch.zeros(channels), torch.ones(channels))
    path.write_text(json.dumps(stats.to_json()))


def write_codec(config: Config) -> None:
    """In place of the codec's stage: its weights as they are before the first step, with the latents' statistics."""
    folder = Path(config.run_dir) / "weights" / "codec"
    if folder.exists():
        return
    write_stats(config)
    stage = config.stage("codec")
    task = make_task(config, stage)
    parameters = dict(task.build(Mesh(0, 1, torch.device("cpu"))).named_parameters())
    task.export(folder, parameters, stage.steps)


def losses(config: Config, stage: str) -> dict[int, float]:
    """Training loss by step, as a reader of metrics.jsonl sees it."""
    return {
        record.step: record.values["loss/total"]
        for record in read_metrics(config.run_dir)
        if record.stage == stage and record.kind == "train"
    }


class StopAfter(StopRequest):
    """Asks to stop in the n-th step that looks."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left == 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def launcher(code: str) -> subprocess.Popen[str]:
    """`code` in a process and session of its own, as `unicom train` is; its output is piped."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
