"""UniComPipeline with random weights in memory. One process, a few seconds."""

import numpy as np
import pytest
import torch
from PIL import Image

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.data.conversations import Conversation, Message
from unicom_dist.data.samples import Arrays, Content, Words, collate, grid_positions
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.encoders import EncodedImage
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.sample.dialogue import Dialogue
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pictures import Latents, to_pictures
from unicom_dist.sample.pipeline import MAX_PROMPT_TOKENS, UniComPipeline
from unicom_dist.sample.solver import noise_from_seeds
from unicom_dist.testing.tiny import COLOURS, draw_shape, tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_codec, tiny_prior, tiny_stats

PROMPTS = ["a red circle", "a blue square", "a very small purple triangle", "cat"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_tiny_assets(folder)
    config = tiny_config(folder)
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    prior = LoadedPrior(tiny_prior(config, vocabulary), vocabulary, tiny_stats(config))
    return UniComPipeline(tiny_codec(config), config.encoder, prior)


def encoded(seed: int, rows: int, columns: int) -> EncodedImage:
    features = np.random.default_rng(seed).standard_normal((rows * columns, CHANNELS)).astype(np.float32)
    return EncodedImage(features, (rows, columns))


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_a_picture_does_not_depend_on_batch_size_or_order(pipeline):
    seeds = [5, 6, 7, 8]
    together = pipeline.draw_latents(PROMPTS, seeds, steps=3)
    alone = [pipeline.draw_latents([p], [s], steps=3)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = pipeline.draw_latents(PROMPTS[::-1], seeds[::-1], steps=3)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values, c.values, atol=1e-5, rtol=1e-5)
    pictures = pipeline(PROMPTS, seeds, steps=3, decoder_steps=3)
    for prompt, seed, picture in zip(PROMPTS, seeds, pictures, strict=True):
        assert distance(pipeline(prompt, seed, steps=3, decoder_steps=3)[0], picture) <= 1  # rounding to 8 bits


def test_internal_batches_do_not_show(pipeline):
    small = UniComPipeline(pipeline.codec, pipeline.encoder_config, pipeline.prior, batch=3)
    a, b = pipeline(PROMPTS, 1, steps=2, decoder_steps=2), small(PROMPTS, 1, steps=2, decoder_steps=2)
    assert max(distance(x, y) for x, y in zip(a, b, strict=True)) <= 1


def test_prompt_and_seed_both_matter(pipeline):
    red, blue, other = pipeline.draw_latents([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [0, 0, 1], steps=2)
    assert (red.values - blue.values).abs().max() > 1e-4
    assert (red.values - other.values).abs().max() > 1e-2


def test_velocity_equals_the_training_forward(pipeline):
    # The sampler's cached prefix must see exactly what training put before the image.
    prior, layout = pipeline.prior.model, pipeline.layouts.text_to_image("a red circle", (2, 3))
    z, noise = torch.randn(6, prior.latent_channels), torch.randn(6, prior.latent_channels)
    content = Content("k", layout, [Arrays(z, noise, 0.4)])
    with torch.no_grad():
        _, expected = prior(collate([content], prior.latent_channels, prior.feature_channels))
    asked = Dialogue((Message("user", (Words("a red circle"),)),)).content(pipeline.layouts, "raw", draws=True)
    prefix = prior.encode_prefix(collate([asked], prior.latent_channels, CHANNELS))
    z_t = 0.4 * z + 0.6 * noise
    got = prior.velocity_from_prefix(prefix, z_t[None], torch.tensor([0.4]), grid_positions(2, 3))
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)


def test_one_euler_step_is_the_guided_velocity(pipeline):
    prior = pipeline.prior.model

    def velocity(text: str, noise: torch.Tensor) -> torch.Tensor:
        said = (Words(text),) if text else ()
        prefix = collate([Dialogue((Message("user", said),)).content(pipeline.layouts, "raw", draws=True)], 4, CHANNELS)
        return prior.velocity_from_prefix(prior.encode_prefix(prefix), noise, torch.zeros(1), grid_positions(4, 4))

    noise = noise_from_seeds([9], (16, prior.latent_channels), "prior")
    conditional, unconditional = velocity("a red circle", noise), velocity("", noise)
    for guidance in (0.0, 1.0, 3.0):
        z = noise + unconditional + guidance * (conditional - unconditional)
        got = pipeline.draw_latents(["a red circle"], 9, steps=1, guidance=guidance, grid=(4, 4))[0]
        torch.testing.assert_close(got.values, pipeline.prior.stats.denormalise(z)[0], atol=1e-5, rtol=1e-5)


def test_an_edit_follows_the_training_layout(pipeline):
    # One Euler step without guidance: the velocity that training's forward has at t = 0 for the same conversation.
    prior, item = pipeline.prior.model, encoded(5, 2, 3)
    latents = pipeline.prior.stats.normalise(pipeline.encode([item])[0].values)
    noise = noise_from_seeds([3], (6, prior.latent_channels), "prior")[0]
    said = {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "a blue square"}]}
    reply = {"role": "assistant", "content": [{"type": "image", "image": "b"}]}
    conversation = Conversation.parse({"messages": [said, reply]}, "k")
    layout, keys = conversation.layout(pipeline.layouts, "image_text_to_image", lambda key, read: (2, 3))
    assert keys == ["a", "b"]
    content = Content("k", layout, [Arrays(latents), Arrays(torch.zeros(6, prior.latent_channels), noise, 0.0)])
    with torch.no_grad():
        _, v = prior(collate([content], prior.latent_channels, prior.feature_channels))
    expected = pipeline.decode([Latents(pipeline.prior.stats.denormalise(noise + v), (2, 3))], 3, 2)[0]
    drawn = pipeline.edit(item, "a blue square", 3, steps=1, guidance=1, image_guidance=1, decoder_steps=2)
    assert distance(drawn, expected) <= 1


def test_grids_of_different_shapes_share_a_batch(pipeline):
    items = [encoded(1, 4, 4), encoded(2, 2, 3), encoded(3, 1, 5)]
    together = pipeline.encode(items)
    assert [tuple(z.values.shape) for z in together] == [(16, 4), (6, 4), (5, 4)]
    pictures = pipeline.decode(together, [1, 2, 3], steps=2)
    for i, item in enumerate(items):
        alone = pipeline.encode([item])
        torch.testing.assert_close(alone[0].values, together[i].values, atol=1e-5, rtol=1e-5)
        assert distance(pipeline.decode(alone, [i + 1], steps=2)[0], pictures[i]) <= 1


def test_a_spatial_codec_has_latents_on_a_grid_of_their_own(tmp_path):
    write_tiny_assets(tmp_path)
    config = tiny_config(tmp_path, codec={"compressor": {"spatial": "pool"}})
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    prior = LoadedPrior(tiny_prior(config, vocabulary), vocabulary, tiny_stats(config))
    fewer = UniComPipeline(tiny_codec(config), config.encoder, prior)
    items = [encoded(1, 4, 4), encoded(2, 2, 3), encoded(3, 1, 5)]
    together = fewer.encode(items)
    assert [(len(z.values), z.grid) for z in together] == [(4, (2, 2)), (2, (1, 2)), (3, (1, 3))]
    pictures = fewer.decode(together, [1, 2, 3], steps=2)
    for i, item in enumerate(items):
        alone = fewer.encode([item])
        torch.testing.assert_close(alone[0].values, together[i].values, atol=1e-5, rtol=1e-5)
        assert distance(fewer.decode(alone, [i + 1], steps=2)[0], pictures[i]) <= 1
    assert fewer.draw_latents(["a red circle"], steps=1)[0].grid == (2, 2)  # half of the encoder's 4 x 4


def test_pictures_and_their_features_reconstruct_alike(pipeline):
    shapes = [draw_shape("circle", COLOURS["red"]), draw_shape("square", COLOURS["blue"])]
    transparent = shapes[1].convert("RGBA")
    features = pipeline.features(shapes)
    from_pictures = pipeline.reconstruct([shapes[0], transparent], decoder_steps=2)
    assert from_pictures[0].size == (16, 16)
    mixed = pipeline.reconstruct([features[0], shapes[1]], decoder_steps=2)
    assert [distance(a, b) for a, b in zip(from_pictures, mixed, strict=True)] == [0, 0]
    assert distance(from_pictures[0], from_pictures[1]) > 0


def test_captions_do_not_depend_on_the_batch(pipeline):
    items = [encoded(1, 4, 4), encoded(2, 2, 3), encoded(3, 4, 4)]
    together = pipeline.captions(items, max_tokens=8)
    assert [pipeline.understand(item, max_tokens=8) for item in items] == together


def test_greedy_caption_follows_the_training_layout(pipeline):
    # The likeliest first token after the prompt must be the argmax of the label that training puts there.
    prior, vocabulary = pipeline.prior.model, pipeline.prior.vocabulary
    item = encoded(4, 2, 2)
    layout = pipeline.layouts.image_to_text("a red circle", item.grid)
    batch = collate([Content("", layout, [Arrays(torch.from_numpy(item.features))])], prior.latent_channels, CHANNELS)
    with torch.no_grad():
        hidden = prior.hidden(batch, AttentionPlan.build(batch.segments, prior.dtype))
        logits = prior.backbone.lm_head.logits(hidden[batch.label_index])
    first = vocabulary.decode([int(logits[0].argmax())]).strip()
    assert pipeline.understand(item, max_tokens=1) == first


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompts_are_refused(pipeline, prompt):
    with pytest.raises(ConfigError, match="prompt is empty"):
        pipeline(["fine", prompt], steps=1)


def test_too_long_prompts_are_refused_not_cut(pipeline):
    with pytest.raises(ConfigError, match=rf"at most {MAX_PROMPT_TOKENS} are read"):
        pipeline("circle " * (MAX_PROMPT_TOKENS + 1), steps=1)


def test_seeds_must_match_prompts(pipeline):
    with pytest.raises(ConfigError, match="3 seeds for 2 pictures"):
        pipeline(PROMPTS[:2], [1, 2, 3])


def test_features_of_another_encoder_are_refused(pipeline):
    foreign = EncodedImage(np.zeros((4, CHANNELS + 1), np.float32), (2, 2))
    with pytest.raises(ConfigError, match=f"features of {CHANNELS + 1} channels"):
        pipeline.reconstruct([foreign])


def test_without_a_prior_only_pictures_work(pipeline):
    codec_only = UniComPipeline(pipeline.codec, pipeline.encoder_config)
    assert len(codec_only.reconstruct([encoded(1, 2, 2)], decoder_steps=1)) == 1
    for call in (lambda: codec_only("cat"), lambda: codec_only.understand(encoded(1, 2, 2))):
        with pytest.raises(CheckpointError, match="no prior yet"):
            call()


def test_another_encoder_than_in_training_is_refused(pipeline):
    foreign = UniComPipeline(pipeline.codec, pipeline.encoder_config, content={"encoder_fingerprint": "other"})
    with pytest.raises(CheckpointError, match="not the one the model was trained with"):
        foreign.reconstruct([draw_shape("circle", COLOURS["red"])])


def test_pixels_are_clamped_and_rounded():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_pictures(pixels)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
