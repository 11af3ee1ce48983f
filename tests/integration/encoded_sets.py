"""Features of ingested sets without Ray, and latents that are their first channels."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.features import FeatureWorker
from pipelines.parts import ShardTask
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import read_npy, write_npy
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import Shard, ShardEntry, ShardWriter
from unicom_dist.models.encoders import build_encoder


def write_features(config: Config, names: Sequence[str]) -> None:
    """Encode the sets `names` in this process; latents go below the run directory."""
    encoder, kind = build_encoder(config.encoder), config.encoder.kind
    worker = FeatureWorker(encoder, 8, "float16", 1)
    for name in names:
        folder, latents = Path(config.data.path) / name, Path(config.run_dir) / "latents" / name
        manifests = {part: Manifest(part=part, fingerprint=encoder.fingerprint) for part in (kind, "latent")}
        for shard in ShardSet(folder).manifest.shards:
            target = folder / part_name(shard.name, kind)
            task = ShardTask("", str(folder / shard.name), str(target), shard.samples, "")
            manifests[kind].shards.append(worker.process(task, lambda _: None).entry)
            channels = config.codec.compressor.channels
            manifests["latent"].shards.append(_latents(target, latents / part_name(shard.name, "latent"), channels))
        manifests[kind].write(folder)
        manifests["latent"].write(latents)


def _latents(features: Path, target: Path, channels: int) -> ShardEntry:
    shard = Shard(features)
    with ShardWriter(target) as writer:
        for number, key in enumerate(shard.keys):
            values = read_npy(shard.member(number, "features.npy"), key)[:, :channels].copy()
            writer.write(key, {"latent.npy": write_npy(values), "json": bytes(shard.member(number, "json"))})
    return writer.entry
