"""The linear start of a compressor: a reduced-rank regression of what lies under each token. One process, 15 s."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import CodecConfig, CompressorConfig
from unicom_dist.data.samples import grid_positions
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.patches import patchify
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.train.codec import CodecTask
from unicom_dist.train.linear_start import Regression, linear_start, set_start, under_tokens


def test_components_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicom_dist.train.linear_start.RIDGE", 0.0)
    torch.manual_seed(0)
    x = torch.randn(500, 12) * torch.logspace(0, -2, 12) + 0.5
    y = x @ torch.randn(12, 7) + 0.1 * torch.randn(500, 7) - 2
    regression = Regression()
    for rows in (slice(0, 130), slice(130, 500)):
        regression.add(x[rows], y[rows])
    centred, target = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    fitted = centred @ torch.linalg.lstsq(centred, target).solution
    for limit in (3, 7, 20):
        weight, bias = regression.components(limit, whiten=True)
        found = (x @ weight.T + bias).double()
        assert weight.shape == (min(limit, 7), 12)
        torch.testing.assert_close(found.mean(0), torch.zeros(len(weight)).double(), atol=1e-3, rtol=0)
        torch.testing.assert_close(found.T @ found / 500, torch.eye(len(weight)).double(), atol=2e-3, rtol=0)
        u, s, v = torch.linalg.svd(fitted, full_matrices=False)
        best = u[:, :limit] * s[:limit] @ v[:limit]
        again = found @ torch.linalg.lstsq(found, target).solution
        torch.testing.assert_close(again, best, atol=5e-3, rtol=0)
        weight, bias = regression.components(limit, whiten=False)
        scaled = (x @ weight.T + bias).double()
        shares = s.square()[: len(weight)] / s.square()[: len(weight)].mean()  # of the fit, by component
        torch.testing.assert_close(scaled.square().mean(0), shares, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(scaled, found * shares.sqrt(), atol=2e-3, rtol=0)


def test_tokens_have_their_part_of_the_picture_under_them() -> None:
    picture = torch.randn(3, 8, 12)
    found = under_tokens(picture, 2, 3, 4)
    torch.testing.assert_close(found, patchify(picture[None], 4)[0])


def batch_of(grids: list[tuple[int, int]], channels: int) -> CodecBatch:
    """Pictures that are a linear function of the features under 2 x 2 pixels a token, and padding that is not."""
    torch.manual_seed(1)
    size, longest, lift = len(grids), max(r * c for r, c in grids), torch.randn(channels, 12)
    features, mask = torch.full((size, longest, channels), 9.0), torch.zeros(size, longest, dtype=torch.bool)
    grid, images = torch.zeros(size, longest, 2, dtype=torch.long), torch.zeros(size, 3, 8, 8)
    for row, (rows, columns) in enumerate(grids):
        n = rows * columns
        tokens = torch.randn(n, channels)
        features[row, :n], mask[row, :n], grid[row, :n] = tokens, True, grid_positions(rows, columns)
        small = torch.nn.functional.layer_norm(tokens, (channels,)) @ lift
        cells = small.T.reshape(12, rows, columns)
        whole = torch.nn.functional.pixel_shuffle(cells, 2)
        images[row] = whole.repeat_interleave(8 // whole.shape[1], 1).repeat_interleave(8 // whole.shape[2], 2)
    zeros = torch.zeros(size, longest, 4)
    return CodecBatch(
        images, features, mask, grid, torch.zeros(size, 3, 8, 8), zeros[:, 0, 0], zeros, zeros[:, 0, 0], []
    )


def test_start_reads_the_pictures_and_not_the_padding() -> None:
    config = CodecConfig(compressor=CompressorConfig(channels=16, heads=2, attention_width=8, start="linear"))
    compressor = Codec(config, 20).compressor
    batch = batch_of([(4, 4), (2, 2), (4, 4), (4, 4)], 20)
    weight, bias = linear_start(compressor, [batch], whiten=True)
    assert weight.shape == (12, 20)
    other = replace(batch, features=torch.where(batch.mask[..., None], batch.features, -3.0))
    torch.testing.assert_close(linear_start(compressor, [other], whiten=True)[0], weight)
    rest = compressor.block.straight.weight[12:].clone()  # type: ignore[union-attr]
    set_start(compressor, (weight, bias))
    read: list[Tensor] = []
    compressor.block.straight.register_forward_hook(lambda _, __, out: read.append(out))  # type: ignore[union-attr]
    compressor(batch.features, batch.mask, batch.grid)
    torch.testing.assert_close(compressor.block.straight.weight[12:], rest)  # type: ignore[union-attr]
    whole = torch.stack([under_tokens(batch.images[i], 4, 4, 2) for i in (0, 2, 3)])
    latents = read[0][[0, 2, 3], :, :12].flatten(0, 1).double()
    truth = whole.flatten(0, 1).double()
    truth, latents = truth - truth.mean(0), latents - latents.mean(0)
    left = truth - latents @ torch.linalg.lstsq(latents, truth).solution
    assert left.square().mean() < 0.02 * truth.square().mean()


def test_a_codec_stage_starts_there_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, codec={"compressor": {"start": "linear"}})
    plain = tiny_config(tmp_path)
    write_tiny_assets(tmp_path)
    write_tiny_sets(config, 12)
    mesh = Mesh(0, 1, torch.device("cpu"))
    task = CodecTask(config, config.stage("codec"))
    first, copy = task.build(mesh), task.build(mesh)
    usual = CodecTask(plain, plain.stage("codec")).build(mesh)
    assert task._start is not None
    changed = []
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, copy.get_parameter(name))
        if not torch.equal(parameter, usual.get_parameter(name)):
            changed.append(name)
    parts = ("straight.weight", "straight.bias", "attention.out.weight", "mlp_out.weight")
    assert changed == [f"compressor.block.{part}" for part in parts]
    torch.testing.assert_close(first.compressor.block.straight.weight, task._start[0])


def test_without_a_linear_path_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="start = linear with kind = mlp"):
        load_recipe("recipes/tiny.yaml", ["codec.compressor={kind: mlp, start: linear}"])
