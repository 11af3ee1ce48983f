"""Codec stages over a VAE's latents, from a published decoder of which a part trains: two ranks train as one process.

Recipes with tensor or pipeline parallelism too: a codec stage is data-parallel over all ranks. One start of two ranks
for all cases, some minutes on two cores.
"""

import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_run import StopAfter, losses, tiny_run

from unicom_dist.checkpoint.saved import Checkpoint, latest
from unicom_dist.config.errors import CheckpointError, Preempted
from unicom_dist.config.schema import Config
from unicom_dist.models.decoder_training import plain_name
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.sample.loading import load_codec
from unicom_dist.sample.pictures import PictureCodec
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.testing.tiny import COLOURS, draw_shape
from unicom_dist.testing.tiny_flux import POOLED, tiny_flux, tiny_flux_keys, tiny_vae, write_tiny_flux
from unicom_dist.train.loop import train_stage
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.watchdog import Watchdog

STEPS = 4
STAGE = {"steps": STEPS, "batch": 8, "micro_batches": 2, "lr": 1e-2, "warmup": 1, "ema": 0.5, "clip": 0.3, "eps": 1e-4}
CASES = {  # what trains, and the recipe's layout
    "z0 tp2": ("image-branch", {"nproc": 2, "zero_stage": 0, "tp": 2}),
    "z2": ("projector", {"nproc": 2, "zero_stage": 2}),
    "z3": ("lora", {"nproc": 2, "zero_stage": 3}),  # stopped after two steps
}
RELATIVE = 1e-5
TRAINED = 3e-5  # of weights: Adam makes whole steps of the small first gradients, rounding included


def recipe(folder: Path, run: str, trainable: str, parallel: dict | None = None) -> Config:
    decoder = {
        **tiny_flux_keys(folder / "flux"),
        "pooled_path": str(folder / "pooled.safetensors"),
        "guidance": 2.0,
        "trainable": trainable,
        "lora_rank": 2,
        "gradient_checkpointing": True,
    }
    return tiny_run(
        folder,
        CHANNELS,
        run_dir=str(folder / "runs" / run),
        codec={"decoder": decoder, "condition_dropout": 0.4, "resolution_shift": True, "latent_noise_tau": 0.3},
        parallel=parallel or {},
        stages={"codec": STAGE},
    )


def train(config: Config, mesh: Mesh, stop: StopRequest | None = None) -> None:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    train_stage(config, config.stage("codec"), mesh, stop or StopRequest(), Watchdog(), None)


def work(rank: int, world: int, folder: Path) -> str:
    """All cases; the traceback of the one that failed."""
    try:
        for name, (trainable, parallel) in CASES.items():
            config = recipe(folder, name, trainable, parallel)
            mesh = init_mesh(config.layout(config.stage("codec"), world), 300)
            if name == "z3":
                with pytest.raises(Preempted):
                    train(config, mesh, StopAfter(2))
            else:
                train(config, mesh)
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of two ranks and of one process, by case."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("codec-stages")
    write_tiny_flux(folder / "flux", seed=1)
    save_file({"pooled": torch.randn(POOLED)}, folder / "pooled.safetensors")
    alone = Mesh(0, 1, torch.device("cpu"))
    for name, (trainable, _) in CASES.items():
        train(recipe(folder, f"{name} alone", trainable), alone)
    assert run_ranks(work, 2, folder, timeout_s=600) == ["", ""]
    # What two ranks began under ZeRO-3 one process ends without.
    train(recipe(folder, "z3", CASES["z3"][0]), alone)
    return folder


pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


def end_of(folder: Path, run: str) -> Checkpoint:
    path = latest(folder / "runs" / run / "checkpoints" / "codec")
    assert path is not None
    return Checkpoint(path)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(name: str, folder: Path) -> None:
    configs = [recipe(folder, run, CASES[name][0]) for run in (name, f"{name} alone")]
    got, expected = (losses(config, "codec") for config in configs)
    assert got.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, value in expected.items():
        assert got[step] == pytest.approx(value, rel=RELATIVE)
    for kind in ("weight", "ema"):
        mine, theirs = (end_of(folder, run).tensors(kind) for run in (name, f"{name} alone"))
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (mine[key] - tensor).abs().max() <= TRAINED * tensor.abs().max(), f"{kind} of {key}"


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_stays_as_published_and_the_rest_moves(name: str, folder: Path) -> None:
    weights, published = end_of(folder, name).tensors("weight"), dict(tiny_flux(1).named_parameters())
    moved = set()
    for key, tensor in weights.items():
        inner = plain_name(key.removeprefix("decoder.flux."))
        if inner in published and not torch.equal(tensor, published[inner]):
            moved.add(inner)
    if CASES[name][0] == "image-branch":
        assert "transformer_blocks.0.attn.to_q.weight" in moved
        assert "single_transformer_blocks.1.proj_mlp.weight" in moved
        assert "transformer_blocks.0.attn.add_q_proj.weight" not in moved
    else:
        assert moved == set()
    if CASES[name][0] == "lora":
        adapters = [tensor for key, tensor in weights.items() if ".lora_B." in key]
        assert adapters
        assert all(bool(tensor.any()) for tensor in adapters[:-2])  # nobody reads the last block's tokens
    assert torch.equal(weights["decoder.pooled"], load_file(folder / "pooled.safetensors")["pooled"])
    assert not any("vae" in key for key in weights)


def test_the_exported_codec_has_its_adapters_and_knows_its_vae(folder: Path) -> None:
    loaded = load_codec(folder / "runs" / "z3" / "weights" / "codec")
    average = end_of(folder, "z3").tensors("ema")
    for key, tensor in loaded.model.named_parameters():
        assert torch.equal(tensor, average[key].bfloat16().float()), key
    pictures = PictureCodec(loaded.model, loaded.encoder, loaded.content)
    drawn = pictures.reconstruct([draw_shape("circle", COLOURS["red"])], decoder_steps=2, guidance=2.0)
    assert drawn[0].size == (16, 16)


def test_another_vae_ends_a_run_that_continues(folder: Path) -> None:
    config = recipe(folder, "z3", "lora")
    tiny_vae(9).save_pretrained(folder / "other")
    decoder = config.codec.decoder.model_copy(update={"vae_path": str(folder / "other")})
    other = config.model_copy(update={"codec": config.codec.model_copy(update={"decoder": decoder})})
    with pytest.raises(CheckpointError, match="not the one the codec was trained with"):
        train(other, Mesh(0, 1, torch.device("cpu")))
