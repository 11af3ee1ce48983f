"""The pixel decoder against diffusers' FLUX transformer, and the border of the two conventions. One process."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.decoder import LEAST_REMAINING, DiffusionDecoder, from_flux, to_flux
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.flow import interpolate, target
from unicom_dist.models.init import initialise
from unicom_dist.models.patches import patchify, token_under_patch, unpatchify

FLUX = "FluxTransformer2DModel"
CHANNELS = 20
CONFIG = DecoderConfig(
    image_px=16, patch_px=4, double_blocks=2, single_blocks=2, heads=2, head_dim=16, rope_axes=(4, 6, 6)
)


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "OSError", "AttributeError", "ValueError"])
def test_a_torchvision_of_another_torch_is_hidden(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that what the test leaves is undone
    del sys.modules["torchvision"]
    if error == "ValueError":  # nothing a mismatch ends in: not ours to hide
        with pytest.raises(ValueError, match="nms"):
            diffusers_class(FLUX)
        return
    assert diffusers_class(FLUX).__name__ == FLUX
    assert sys.modules["torchvision"] is None


def decoder(config: DecoderConfig = CONFIG) -> DiffusionDecoder:
    """A decoder none of whose parts is zero."""
    built = DiffusionDecoder(config, CHANNELS).double()
    initialise(built, seed=2)
    return built


def inputs(batch: int = 3, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    z_t = torch.randn(batch, 3, side, side, generator=draw, dtype=torch.float64)
    tokens = torch.randn(batch, 6, CHANNELS, generator=draw, dtype=torch.float64)
    grid = torch.tensor(list(product(range(2), range(3)))).expand(batch, -1, -1)
    return z_t, torch.rand(batch, generator=draw, dtype=torch.float64), tokens, grid


@torch.no_grad()
@pytest.mark.parametrize("positions", ["zero", "grid"])
def test_output_equals_diffusers_own_forward(positions: str) -> None:
    network = decoder(CONFIG.model_copy(update={"token_positions": positions}))
    z_t, t, tokens, grid = inputs()
    mine = network.predict(z_t, t, tokens, grid)
    rows = torch.tensor(list(product(range(4), range(4)))).double()
    places = torch.zeros(6, 2).double()
    if positions == "grid":  # 2 x 3 tokens over 4 x 4 patches: the centres of their cells
        places = torch.stack([grid[0, :, 0] * 2 + 0.5, (grid[0, :, 1] + 0.5) * 4 / 3 - 0.5], -1)
    ids = [torch.nn.functional.pad(x, (1, 0)) for x in (places, rows)]
    reference = diffusers_class(FLUX)(**network.flux.config).double()  # with its own attention processor
    reference.load_state_dict(network.flux.state_dict())
    theirs = reference(
        hidden_states=patchify(z_t, 4),
        encoder_hidden_states=tokens,
        pooled_projections=torch.zeros(3, 8).double(),
        timestep=1 - t,
        txt_ids=ids[0],
        img_ids=ids[1],
        return_dict=False,
    )[0]
    torch.testing.assert_close(mine, unpatchify(theirs, 4, 16, 16), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padded_tokens_are_not_seen() -> None:
    network = decoder()
    z_t, t, tokens, grid = inputs()
    mask = (torch.arange(6) < 3).expand(3, -1)  # the first row of the token grid
    out = network(z_t, t, tokens, grid, mask)
    noisy = torch.where(mask[..., None], tokens, 100.0)
    torch.testing.assert_close(network(z_t, t, noisy, grid * mask[..., None], mask), out)
    torch.testing.assert_close(network(z_t, t, tokens[:, :3], grid[:, :3]), out)
    assert not torch.allclose(network(z_t, t, tokens, grid), out)


@torch.no_grad()
def test_an_image_is_decoded_alike_alone_and_among_others() -> None:
    network = decoder()
    z_t, t, tokens, grid = inputs()
    torch.testing.assert_close(network(z_t[1:2], t[1:2], tokens[1:2], grid[1:2]), network(z_t, t, tokens, grid)[1:2])


def test_patches_follow_the_order_of_flux_latents() -> None:
    """Channel-major inside a patch, rows of patches outermost; and back."""
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())
    assert torch.equal(unpatchify(patches, 4, 8, 12), images)


def test_conventions_meet_at_the_border() -> None:
    """A perfect FLUX network, which predicts noise - data at sigma, gives v = data - noise; as does a clean one."""
    data, noise = torch.randn(2, 4, 3, 8, 8).unbind(0)
    t = torch.tensor([0.0, 0.3, 0.7, 0.9])
    z_t = interpolate(data, noise, t)
    sigma = to_flux(t)[:, None, None, None]
    torch.testing.assert_close(z_t, (1 - sigma) * data + sigma * noise)  # what FLUX's scheduler calls the noised sample
    torch.testing.assert_close(from_flux(noise - data, z_t, t, "velocity"), target(data, noise))
    torch.testing.assert_close(from_flux(data, z_t, t, "clean"), target(data, noise), rtol=1e-3, atol=1e-4)


def test_convention_is_that_of_diffusers_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    data, noise = torch.randn(2, 1, 3, 8, 8).unbind(0)
    step = 300
    sigma = scheduler.sigmas[step]
    noised = scheduler.scale_noise(data, scheduler.timesteps[step : step + 1], noise)
    torch.testing.assert_close(noised, interpolate(data, noise, (1 - sigma)[None]))
    after = scheduler.step(noise - data, scheduler.timesteps[step], noised).prev_sample
    velocity = from_flux(noise - data, noised, 1 - sigma[None], "velocity")
    towards_data = noised + (sigma - scheduler.sigmas[step + 1]) * velocity
    torch.testing.assert_close(after, towards_data)


def test_clean_prediction_stays_finite_at_the_data() -> None:
    z_t = torch.ones(1, 3, 4, 4)
    assert from_flux(torch.zeros_like(z_t), z_t, torch.ones(1), "clean").abs().max() == pytest.approx(
        1 / LEAST_REMAINING
    )


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_fresh_decoder_predicts_zero_and_gives_its_last_layer_gradients(prediction: str) -> None:
    network = decoder(CONFIG.model_copy(update={"prediction": prediction}))
    network.reset()
    z_t, t, tokens, grid = inputs()
    output = network.predict(z_t, t, tokens, grid)
    assert not output.any()
    (output - 1).square().sum().backward()
    assert network.flux.proj_out.weight.grad.any()
    zero = [name for name, parameter in network.named_parameters() if parameter.dim() > 1 and not parameter.any()]
    assert len(zero) == 1 + 1 + 2 * 2 + 2  # output, its norm, two norms per double block, one per single block


def test_recomputation_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        network = decoder(CONFIG.model_copy(update={"gradient_checkpointing": recompute}))
        network(*inputs()).square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 50
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_each_patch_lies_on_the_token_that_covers_it() -> None:
    two_by_three = torch.tensor(list(product(range(2), range(3))))
    one_by_two_padded = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    under = token_under_patch(torch.stack([two_by_three, one_by_two_padded]), 4, 6)
    first = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert under[0].view(4, 6).tolist() == first
    assert under[1].view(4, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 4


@torch.no_grad()
def test_concatenated_tokens_reach_the_patches_above_them() -> None:
    network = decoder(CONFIG.model_copy(update={"concat_tokens": True, "double_blocks": 0, "single_blocks": 0}))
    z_t, t, tokens, grid = inputs(1)
    changed = tokens.clone()
    changed[:, 4] += 1  # second row, middle column: without blocks nothing else can carry it
    moved = (network(z_t, t, tokens, grid) != network(z_t, t, changed, grid)).any(1)[0]
    touched = patchify(moved[None, None].expand(1, 3, -1, -1), 4)[0].any(1).view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[2:, 1:3] = True
    assert torch.equal(touched, expected)
