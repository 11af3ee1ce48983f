"""An encoder that learns with the codec: its views, its tie to the stored features, its export. One process, 20 s."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import Config, EncoderConfig
from unicom_dist.data.samples import grid_positions
from unicom_dist.models.codec import Codec, drift
from unicom_dist.models.encoders import build_encoder, encoder_fingerprint, encoder_view
from unicom_dist.models.encoders.efficientnet import EfficientNetLite2
from unicom_dist.models.encoders.trained import TrainedEncoder, export_encoder
from unicom_dist.objective.terms import total
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.sample.loading import load_codec
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_siglip2 import write_tiny_siglip2
from unicom_dist.train.codec import CodecTask

ALONE = Mesh(0, 1, torch.device("cpu"))


def efficientnet(folder: Path) -> EncoderConfig:
    """A random network in the published format, loud enough for its tokens to differ."""
    torch.manual_seed(0)
    network = EfficientNetLite2()
    for parameter in network.parameters():
        parameter.data.mul_(1.8)
    folder.mkdir(parents=True)
    save_file(network.published(), folder / "model.safetensors")
    return EncoderConfig(kind="efficientnet-lite2", path=str(folder), image_px=64, levels="pyramid")


def siglip2(folder: Path) -> EncoderConfig:
    return EncoderConfig(kind="siglip2", path=str(write_tiny_siglip2(folder)), max_patches=12)


@pytest.mark.parametrize("make", [efficientnet, siglip2])
def test_tokens_are_the_frozen_encoder_s_until_it_learns_and_export_keeps_what_it_learnt(
    make: Any, tmp_path: Path
) -> None:
    config = make(tmp_path / "published")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels[:, :60])]
    frozen, view = build_encoder(config, "cpu"), encoder_view(config)
    expected = frozen.encode([frozen.preprocess(picture) for picture in pictures])
    counts = [len(found.features) for found in expected]
    views = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(view(p))) for p in pictures], batch_first=True)
    assert config.kind != "siglip2" or counts[0] > counts[1]  # one is padded
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    grid = torch.zeros(2, max(counts), 2, dtype=torch.long)
    for row, found in enumerate(expected):
        grid[row, : counts[row]] = grid_positions(*found.grid)
    stored = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(f.features.copy()) for f in expected], batch_first=True)
    encoder = TrainedEncoder(config)
    tokens = encoder(views, mask, grid)
    torch.testing.assert_close(tokens, stored, rtol=1e-4, atol=1e-5)
    tokens.square().mean().backward()
    trained = dict(encoder.named_parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in trained.values()) > len(trained) / 2
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.05)
    later = encoder(views, mask, grid).detach()
    away = drift(later, stored, mask)
    assert (away > 0).all()
    mean = (later[1, : counts[1]] - stored[1, : counts[1]]).square().mean()
    torch.testing.assert_close(away[1], mean)
    folder = tmp_path / "exported"
    folder.mkdir()
    export_encoder(config, {f"encoder.{name}": parameter.detach() for name, parameter in trained.items()}, folder)
    changed = config.model_copy(update={"path": str(folder)})
    assert encoder_fingerprint(changed) != encoder_fingerprint(config)
    again = build_encoder(changed, "cpu")
    for row, found in enumerate(again.encode([again.preprocess(picture) for picture in pictures])):
        torch.testing.assert_close(
            torch.from_numpy(found.features.copy()), later[row, : counts[row]], rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("trained")
    encoder = efficientnet(folder / "published").model_dump()
    config = tiny_config(folder, encoder=encoder, codec={"encoder_trainable": True, "distill_weight": 0.25})
    write_tiny_assets(folder)
    write_tiny_sets(config, 8, feature_channels=1280)
    return config


def test_a_codec_stage_trains_the_encoder_against_the_stored_features(config: Config) -> None:
    task = CodecTask(config, config.stage("codec"))
    module = task.build(ALONE)
    assert isinstance(module, Codec)
    batch = next(batch for _, batch in task.heldout())
    assert batch.views is not None
    assert batch.views.shape == (4, 64, 64, 3)
    for parameter in module.decoder.parameters():  # at its start its gates are closed
        parameter.data.normal_(std=0.2)
    terms = task.terms(module(batch), batch)
    assert terms.keys() == task.counts(batch).keys() == {"flow", "distill"}
    assert module.encoder is not None
    expected = drift(module.encoder(batch.views, batch.mask, batch.grid), batch.features, batch.mask).sum()
    torch.testing.assert_close(terms["distill"].sum, expected)
    whole = total(terms, task.counts(batch))
    torch.testing.assert_close(whole, terms["flow"].sum / 4 + 0.25 * expected / 4)
    (terms["flow"].sum).backward()
    assert module.encoder.network.stem.conv.weight.grad.any()  # the codec's own loss reaches it


def test_export_leaves_a_codec_for_the_changed_encoder(config: Config) -> None:
    task = CodecTask(config, config.stage("codec"))
    module = task.build(ALONE)
    weights = {name: 1.1 * parameter.detach() for name, parameter in module.named_parameters()}
    folder = Path(config.run_dir) / "weights" / "codec"
    task.export(folder, weights, 4)
    content = read_weights_config(folder)
    changed = EncoderConfig.model_validate(content["encoder"])
    assert changed.path == str(Path(config.run_dir) / "encoder")
    assert content["encoder_fingerprint"] == encoder_fingerprint(changed) != encoder_fingerprint(config.encoder)
    codec = load_codec(folder)
    assert not any(name.startswith("encoder.") for name, _ in codec.model.named_parameters())
    assert not codec.model.config.encoder_trainable
    batch = next(batch for _, batch in task.heldout())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    encoder = build_encoder(changed, "cpu")
    tokens = encoder.encode([{"pixels": view.numpy()} for view in batch.views])  # type: ignore[union-attr]
    found = torch.stack([torch.from_numpy(item.features.copy()) for item in tokens])
    torch.testing.assert_close(found, module.features(batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("encoder", "codec", "named"),
    [("random", {}, "encoder.kind = random"), ("siglip2", {"condition_dropout": 0.1}, "condition_dropout = 0.1")],
)
def test_what_cannot_go_with_it_is_refused(encoder: str, codec: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"encoder_trainable = true with .*{named}"):
        tiny_config(tmp_path, encoder={"kind": encoder}, codec={"encoder_trainable": True, **codec})
