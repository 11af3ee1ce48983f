"""Conversations: what is read where, interleaved replies, thinking, chat, streaming. Random weights, one process."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from unicom_dist.cli.chat import Session
from unicom_dist.cli.main import run
from unicom_dist.config.errors import ConfigError
from unicom_dist.data.conversations import Message
from unicom_dist.data.samples import END_THINK, THINK, Words, collate
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.encoders import EncodedImage
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.chat import Chat
from unicom_dist.sample.dialogue import Dialogue
from unicom_dist.sample.drawing import Drawing
from unicom_dist.sample.guidance import Guidance
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.sample.replies import Drawn, Writing
from unicom_dist.sample.writing import Chooser, TextStream
from unicom_dist.testing.tiny import COLOURS, draw_shape, tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_codec, tiny_prior, tiny_stats, write_tiny_weights

FAST = Drawing(steps=2, guidance=Guidance(2.0, 1.5), decoder_steps=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    write_tiny_assets(folder)
    return tiny_config(folder)


@pytest.fixture
def pipeline(config):
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    prior = LoadedPrior(tiny_prior(config, vocabulary), vocabulary, tiny_stats(config))
    return UniComPipeline(tiny_codec(config), config.encoder, prior)


@pytest.fixture
def scripted(monkeypatch, pipeline):
    """Lets the model say given tokens, whatever it thinks; what it may not say stays impossible."""

    def script(*parts: str) -> None:
        vocabulary = pipeline.prior.vocabulary
        tokens = [
            t for p in parts for t in ([vocabulary.control[p]] if p in vocabulary.control else vocabulary.encode(p))
        ]
        ids = iter(tokens)

        def next_logits(self, prefix):
            logits = torch.zeros(prefix.last_hidden.shape[0], vocabulary.size)
            logits[:, next(ids)] = 9.0
            return logits

        monkeypatch.setattr(Transfusion, "next_logits", next_logits)

    return script


def features(seed: int, rows: int = 2, columns: int = 3) -> EncodedImage:
    values = np.random.default_rng(seed).standard_normal((rows * columns, CHANNELS)).astype(np.float32)
    return EncodedImage(values, (rows, columns))


def asking(pipeline: UniComPipeline, *parts: str | EncodedImage) -> Dialogue:
    images = [part for part in parts if isinstance(part, EncodedImage)]
    known = {str(number): seen for number, seen in enumerate(pipeline.seen(images))}
    names = iter(known)
    shown = tuple(Words(part) if isinstance(part, str) else next(names) for part in parts)
    return Dialogue((Message("user", shown),), known)


def test_an_image_is_read_before_text_and_a_reference_before_a_drawing(pipeline) -> None:
    dialogue = asking(pipeline, features(1), "a red circle")
    read, drawn = (dialogue.content(pipeline.layouts, "raw", draws) for draws in (False, True))
    assert [image.use for image in read.layout.images] == ["read"]
    assert [image.use for image in drawn.layout.images] == ["reference"]
    assert torch.equal(drawn.images[0].values, dialogue.images["0"].latents)


def test_text_and_images_follow_each_other(pipeline, scripted) -> None:
    scripted("a red", "<|vision_start|>", "a blue", "<|vision_start|>", "cat", "<|im_end|>")
    pieces = list(pipeline.generate(asking(pipeline, features(1), "go"), 3, Writing(), FAST))
    kinds = "".join("I" if isinstance(piece, Drawn) else piece for piece in pieces)
    assert kinds == "a redIa blueIcat"
    one, two = (piece for piece in pieces if isinstance(piece, Drawn))
    assert one.latents.grid == two.latents.grid == (2, 3)
    assert (one.latents.values - two.latents.values).abs().max() > 1e-2  # other seeds, another context


def test_what_was_drawn_stays_in_the_context_at_its_position(pipeline, scripted) -> None:
    # After an image the context equals the training's layout of the same conversation, its noised latents left out.
    dialogue = asking(pipeline, "go")
    scripted("<|vision_start|>", "<|im_end|>")
    drawn = next(p for p in pipeline.generate(dialogue, 1, Writing(), FAST) if isinstance(p, Drawn))
    content = replace(dialogue, reply=([], drawn.seen)).content(pipeline.layouts, "raw")
    layout, place = content.layout, content.layout.images[0]
    vision_end = pipeline.prior.vocabulary.control["<|vision_end|>"]
    assert place.use == "reference"
    assert layout.tokens[-1] == vision_end
    assert set(layout.rope[place.start : place.start + place.size]) == {layout.rope[-1] - 1}
    assert torch.equal(content.images[0].values, drawn.seen.latents)
    restored = pipeline.prior.stats.denormalise(drawn.seen.latents)
    torch.testing.assert_close(restored, drawn.latents.values)


def test_text_after_a_prefix_grown_token_by_token_equals_reading_it_at_once(pipeline) -> None:
    model = pipeline.prior.model
    dialogue = asking(pipeline, features(2), "a red circle")
    tokens = pipeline.prior.vocabulary.encode("a blue square")

    def read(reply) -> torch.Tensor:
        content = replace(dialogue, reply=reply).content(pipeline.layouts, "raw")
        return collate([content], model.latent_channels, model.read_channels)

    prefix = model.encode_prefix(read(()))
    for token in tokens:
        prefix = model.append_tokens(prefix, torch.tensor([token]))
    whole = model.encode_prefix(read((tokens,)))
    torch.testing.assert_close(model.next_logits(prefix), model.next_logits(whole), atol=1e-5, rtol=1e-5)


def test_thinking_comes_before_the_image(pipeline, scripted) -> None:
    scripted("a red", END_THINK, "never said")
    pieces = list(pipeline.generate(asking(pipeline, "go"), 0, Writing(think=True, draws=True), FAST))
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    assert text.startswith(THINK)
    assert text.rstrip().endswith("</think>")
    assert "a red" in text
    assert isinstance(pieces[-1], Drawn)
    assert sum(isinstance(p, Drawn) for p in pieces) == 1


def test_a_reply_of_text_alone_never_begins_an_image(pipeline, monkeypatch) -> None:
    image = pipeline.prior.vocabulary.control["<|vision_start|>"]

    def next_logits(self, prefix):
        return torch.zeros(1, pipeline.prior.vocabulary.size).index_fill_(1, torch.tensor([image]), 9.0)

    monkeypatch.setattr(Transfusion, "next_logits", next_logits)
    for draws, expected in ((False, 0), (True, 1), (None, 2)):
        writing = Writing(max_tokens=4, draws=draws, images=2)
        pieces = pipeline.generate(asking(pipeline, "go"), 0, writing, FAST)
        assert sum(isinstance(piece, Drawn) for piece in pieces) == expected


def test_nfe_of_branches_and_intervals(pipeline, monkeypatch) -> None:
    rows: list[int] = []
    velocity = Transfusion.velocity_from_prefix

    def counted(self, prefix, z, *others):
        rows.append(len(z))
        return velocity(self, prefix, z, *others)

    monkeypatch.setattr(Transfusion, "velocity_from_prefix", counted)
    for guidance, expected in (
        (Guidance(1.0, 1.0), [1, 1, 1, 1]),
        (Guidance(3.0, 2.0), [3, 3, 3, 3]),
        (Guidance(3.0, 2.0, (0.25, 0.75)), [1, 3, 3, 1]),
    ):
        rows.clear()
        pipeline.draw([asking(pipeline, features(1), "go")], 0, Drawing(4, guidance, decoder_steps=1))
        assert rows == expected


def test_branches_together_equal_branches_alone(pipeline) -> None:
    dialogue = asking(pipeline, features(1), "a red circle")
    drawn = pipeline.draw_dialogues([dialogue], 5, Drawing(1, Guidance(4.0, 1.5)))[0].values
    alone = {
        name: pipeline.draw_dialogues([dialogue.branch(name)], 5, Drawing(1, Guidance(1.0, 1.0)), (2, 3))[0].values
        for name in ("all", "no text", "no image")
    }
    first = alone["no text"] + 4.0 * (alone["all"] - alone["no text"])
    expected = alone["no image"] + 1.5 * (first - alone["no image"])
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_edits_do_not_depend_on_their_neighbours(pipeline) -> None:
    asked = [asking(pipeline, features(n), text) for n, text in enumerate(("a red circle", "cat", "a blue square"))]
    together = pipeline.draw_dialogues(asked, [1, 2, 3], FAST)
    for number, dialogue in enumerate(asked):
        alone = pipeline.draw_dialogues([dialogue], number + 1, FAST)[0]
        torch.testing.assert_close(alone.values, together[number].values, atol=1e-6, rtol=1e-6)


def test_a_missing_reference_is_named(pipeline) -> None:
    with pytest.raises(ConfigError, match="an image 'x' that was not given"):
        list(pipeline.generate(Dialogue((Message("user", ("x", Words("go"))),))))
    with pytest.raises(ConfigError, match="no image to edit"):
        pipeline.edit([], "go")


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    logits = torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(0))
    together, alone, other = Chooser([1, 2, 3], 1.0, 0.9), Chooser([2], 1.0, 0.9), Chooser([4], 1.0, 0.9)
    drawn = [(int(together(step)[1]), int(alone(step[1:2])), int(other(step[1:2]))) for step in logits]
    assert all(a == b for a, b, _ in drawn)
    assert any(a != c for a, _, c in drawn)


def test_top_p_keeps_the_likeliest_that_make_it_up() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    chooser = Chooser([0], 1.0, 0.75)
    counts = torch.bincount(torch.cat([chooser(logits) for _ in range(800)]), minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 800 - 0.625) < 0.05
    assert int(Chooser([0], 1.0, 1e-9)(logits)) == 0


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_impossible_choices_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ConfigError):
        Chooser([0], temperature, top_p)


def test_a_character_waits_for_its_last_byte(pipeline) -> None:
    vocabulary = pipeline.prior.vocabulary
    text = "a café ☕ 🚀!"
    stream = TextStream(vocabulary)
    pieces = [stream.add(token) for token in vocabulary.encode(text)]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.end() == text


def test_a_chat_remembers_until_it_is_reset(pipeline, scripted) -> None:
    chat = Chat(pipeline, 0, FAST)
    scripted("a red", "<|vision_start|>", "cat", "<|im_end|>", "a blue", "<|im_end|>")
    first = list(chat.say("go", [features(1)]))
    assert sum(isinstance(piece, Drawn) for piece in first) == 1
    assert "".join(str(piece) for piece in chat.say("go")) == "a blue"
    roles = [message.role for message in chat._messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert [isinstance(part, str) for part in chat._messages[1].parts] == [False, True, False]
    chat.reset()
    assert not chat._messages
    assert not chat._images


def test_the_session_obeys_its_commands(pipeline, scripted, tmp_path, monkeypatch, capsys) -> None:
    draw_shape("circle", COLOURS["red"]).save(tmp_path / "red.png")
    lines = ["/help", f"/image {tmp_path / 'red.png'}", "what is it", "/draw a cat", "/nonsense", "/image no.png"]
    lines += ["/reset", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    scripted("a red", "<|im_end|>")
    Session(Chat(pipeline, 0, FAST), tmp_path / "out", 0.0, 1.0, 16, False).run()
    said = capsys.readouterr()
    assert "/reset" in said.out
    assert "a red\n" in said.out
    assert "a new conversation" in said.out
    assert f"picture: {tmp_path / 'out' / '000.png'}" in said.out
    assert (tmp_path / "out" / "000.png").is_file()
    assert "no command '/nonsense'" in said.err
    assert "no.png cannot be read" in said.err


def test_the_command_talks_through_a_pipe(config, tmp_path, monkeypatch, capsys) -> None:
    write_tiny_weights(config)
    monkeypatch.setattr("sys.stdin", io.StringIO("/draw a red circle\n/nonsense\n"))
    options = ["--out", str(tmp_path), "--steps", "1", "--max-tokens", "3"]
    assert run(["chat", config.run_dir, *options]) == 0
    said = capsys.readouterr()
    assert f"picture: {tmp_path / '000.png'}" in said.out
    assert "no command" in said.err
    assert run(["chat", config.run_dir, "--temperature", "1", "--top-p", "2"]) == 2


def test_the_command_edits_and_refuses_an_edit_of_nothing(config, tmp_path, capsys) -> None:
    write_tiny_weights(config)
    draw_shape("circle", COLOURS["red"]).save(tmp_path / "red.png")
    shown = ["--image", str(tmp_path / "red.png"), "--out", str(tmp_path), "--steps", "2"]
    choices = ["--image-guidance", "2", "--guidance-interval", "0", "0.5", "--renorm", "global", "--solver", "dpm"]
    assert run(["sample", config.run_dir, "--edit", "a blue square", "--count", "2", *shown, *choices]) == 0
    assert {"edit.png", "edit-000-a-blue-square.png", "edit-001-a-blue-square.png"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert run(["sample", config.run_dir, "--edit", "a blue square"]) == 2
    assert run(["sample", config.run_dir, "cat", "--solver", "rk4"]) == 2
    said = capsys.readouterr().err
    assert "nothing to edit" in said
    assert "--solver" in said
