"""A decoder that starts from a published FLUX computes what diffusers does with it. One process, seconds."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.decoder import DiffusionDecoder
from unicom_dist.models.decoder_weights import decoder_source
from unicom_dist.models.init import fill, initialise
from unicom_dist.models.patches import patchify, unpatchify
from unicom_dist.parallel.tensor import materialise
from unicom_dist.testing.tiny_flux import POOLED, TEXT, tiny_flux, tiny_flux_keys, write_tiny_flux

CHANNELS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_flux(tmp_path_factory.mktemp("flux"), seed=3)


def config(folder: Path, **changes) -> DecoderConfig:
    return DecoderConfig(**{**tiny_flux_keys(folder), **changes})


def loaded(config: DecoderConfig, seed: int = 0) -> DiffusionDecoder:
    with torch.device("meta"):
        decoder = DiffusionDecoder(config, CHANNELS)
    source = decoder_source(decoder, seed)
    materialise(decoder)
    fill(decoder, source, "decoder.")
    return decoder.eval()


def test_the_folder_is_in_the_published_format(folder: Path) -> None:
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True], ids=["zeros", "vector"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_output_equals_diffusers_own_forward(folder: Path, tmp_path: Path, pooled: bool, trainable: str) -> None:
    vector = torch.randn(1, POOLED)
    save_file({"pooled": vector}, tmp_path / "empty.safetensors")
    path = str(tmp_path / "empty.safetensors") if pooled else ""
    decoder = loaded(config(folder, guidance=3.5, pooled_path=path, token_positions="zero", trainable=trainable))
    z_t, t, tokens = torch.randn(3, 4, 8, 12), torch.rand(3), torch.randn(3, 6, CHANNELS)
    grid = torch.tensor(list(product(range(2), range(3)))).expand(3, -1, -1)
    mine = decoder.predict(z_t, t, tokens, grid)
    places = torch.tensor(list(product(range(4), range(6)))).float()
    theirs = tiny_flux(3)(
        hidden_states=patchify(z_t, 2),
        encoder_hidden_states=decoder.projector(tokens),
        pooled_projections=vector.expand(3, -1) if pooled else torch.zeros(3, POOLED),
        timestep=1 - t,
        guidance=torch.full((3,), 3.5),
        txt_ids=torch.zeros(6, 3),
        img_ids=F.pad(places, (1, 0)),
        return_dict=False,
    )[0]
    torch.testing.assert_close(mine, unpatchify(theirs, 2, 8, 12), rtol=1e-5, atol=1e-5)
    assert theirs.abs().mean() > 0.1


@torch.no_grad()
def test_guidance_and_the_pooled_vector_reach_the_output(folder: Path, tmp_path: Path) -> None:
    save_file({"pooled": torch.randn(POOLED)}, tmp_path / "empty.safetensors")
    inputs = torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 4, CHANNELS), torch.zeros(1, 4, 2).long()
    first = loaded(config(folder)).predict(*inputs)
    assert not torch.allclose(loaded(config(folder, guidance=4.0)).predict(*inputs), first)
    pooled = loaded(config(folder, pooled_path=str(tmp_path / "empty.safetensors")))
    assert not torch.allclose(pooled.predict(*inputs), first)
    assert not pooled.pooled.requires_grad


def test_every_tensor_arrives_and_the_rest_is_drawn_from_the_seed(folder: Path) -> None:
    decoder, published = loaded(config(folder), seed=5), dict(tiny_flux(3).named_parameters())
    for name, parameter in decoder.flux.named_parameters():
        assert torch.equal(parameter, published[name]), name
    drawn = DiffusionDecoder(config(folder), CHANNELS)
    initialise(torch.nn.ModuleDict({"decoder": drawn}), 5)
    assert [tuple(parameter.shape) for parameter in decoder.projector.parameters()] == [
        (3 * TEXT, CHANNELS), (3 * TEXT,), (TEXT, 3 * TEXT), (TEXT,)
    ]  # fmt: skip
    for mine, other in zip(decoder.projector.parameters(), drawn.projector.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_linear_projector_is_one_map(folder: Path) -> None:
    assert isinstance(loaded(config(folder, projector="linear")).projector, torch.nn.Linear)
    assert DiffusionDecoder(DecoderConfig(), CHANNELS).projector is None


def test_another_architecture_is_refused_key_by_key(folder: Path) -> None:
    wrong = config(folder, double_blocks=3, heads=4, head_dim=8, rope_axes=(2, 2, 4), guidance_embeds=False)
    with pytest.raises(ConfigError) as error:
        loaded(wrong)
    assert "double_blocks = 3" in error.value.what
    assert "codec.decoder.double_blocks=2" in error.value.remedy
    assert "codec.decoder.rope_axes=[4, 6, 6]" in error.value.remedy
    assert "codec.decoder.guidance_embeds=true" in error.value.remedy
    assert "single_blocks" not in error.value.what
    with pytest.raises(ConfigError, match="text_channels=24"):
        loaded(config(folder, text_channels=0, projector="linear"))


def test_parts_that_do_not_fit_are_named_with_their_shapes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:  # patches of another size: two tensors
        loaded(config(folder, patch_px=1))
    assert "2 of " in error.value.what or "3 of " in error.value.what
    assert "x_embedder.weight is [32, 16], the decoder has [32, 4]" in error.value.why
    source = folder / "transformer"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    kept = load_file(first)
    first.unlink()
    with pytest.raises(CheckpointError, match="absent"):
        loaded(config(folder, init_from=str(tmp_path)))
    save_file({**kept, "unheard.of": torch.zeros(2)}, first)
    with pytest.raises(CheckpointError, match=r"unheard.of is \[2\], the decoder has none"):
        loaded(config(folder, init_from=str(tmp_path)))
    first.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot read"):
        loaded(config(folder, init_from=str(tmp_path)))


def test_folders_of_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable config"):
        loaded(config(folder, init_from=str(tmp_path)))
    with pytest.raises(CheckpointError, match="AutoencoderKL"):
        loaded(config(folder, init_from=str(folder / "vae")))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "patch_size": 2}))
    with pytest.raises(CheckpointError, match="patch_size = 2"):
        loaded(config(folder, init_from=str(tmp_path)))
    save_file({"pooled": torch.zeros(POOLED + 1)}, tmp_path / "pooled.safetensors")
    with pytest.raises(CheckpointError, match=rf"it holds \[{POOLED + 1}\]"):
        loaded(config(folder, pooled_path=str(tmp_path / "pooled.safetensors")))
    with pytest.raises(CheckpointError, match="cannot read"):
        loaded(config(folder, pooled_path=str(tmp_path / "nowhere.safetensors")))


def test_one_tensor_is_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source holds open files, not tensors: what is read is what is asked for."""
    from unicom_dist.models.decoder_weights import Published

    asked: list[str] = []
    read = Published.read
    monkeypatch.setattr(Published, "read", lambda self, name: asked.append(name) or read(self, name))
    with torch.device("meta"):
        decoder = DiffusionDecoder(config(folder), CHANNELS)
    decoder_source(decoder, 0)
    assert asked == []
    loaded(config(folder))
    assert sorted(asked) == sorted(dict(tiny_flux().named_parameters()))
