"""UniComPipeline: text and pictures to pictures, pictures to text.

Drawing is two flows in a row: the prior draws latents for a prompt, the decoder draws pixels for the latents. Each
picture has a seed, from which the noise of both flows is drawn on the CPU: it does not depend on its neighbours in a
batch.
Shapes: P pictures, n latents of d channels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from unicom_dist.checkpoint.weights import export_weights
from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.data.conversations import Message
from unicom_dist.data.samples import INSTRUCTION, Layouts, Words, collate
from unicom_dist.models.codec import Codec
from unicom_dist.models.encoders import EncodedImage
from unicom_dist.models.target import Target
from unicom_dist.sample.dialogue import Dialogue, Seen
from unicom_dist.sample.drawing import Drawing, draw
from unicom_dist.sample.export import text_files, write_index
from unicom_dist.sample.guidance import Guidance, Renorm
from unicom_dist.sample.loading import LoadedPrior, check_pair, default_grid, find_parts, load_codec, load_prior
from unicom_dist.sample.pictures import DOCS, Input, Latents, PictureCodec, features_tensor, seeds_for
from unicom_dist.sample.replies import Drawn, Writing, reply
from unicom_dist.sample.solver import Solver
from unicom_dist.sample.writing import Chooser

MAX_PROMPT_TOKENS = 1024  # no row of training is longer by default
DEFAULT = Drawing()


class UniComPipeline(PictureCodec):
    """A codec, and a prior unless it is not trained yet. Made by `from_pretrained`, or from modules in memory."""

    def __init__(
        self,
        codec: Codec,
        encoder: EncoderConfig,
        prior: LoadedPrior | None = None,
        content: dict[str, Any] | None = None,
        batch: int = 32,
        target: Target | None = None,
    ) -> None:
        super().__init__(codec, encoder, content, batch, target)
        self._prior = prior
        self._layouts: Layouts | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "",
        dtype: torch.dtype = torch.float32,
        stage: str = "",
        batch: int = 32,
    ) -> "UniComPipeline":
        """Load a model folder or a run directory.

        device: "" = the first GPU, else the CPU. dtype: of the computation. stage: a prior stage of a run directory
        other than its last finished one. batch: pictures drawn at a time.
        CheckpointError: no weights, damaged ones, of different runs. DataError: tokenizer missing or another.
        """
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parts = find_parts(folder, stage)
        codec = load_codec(parts.codec, where, dtype)
        prior = None if parts.prior is None else load_prior(parts.prior, where, dtype)
        if prior is not None:
            check_pair(codec.content, prior.content, Path(folder))
        return cls(codec.model, codec.encoder, prior, codec.content, batch)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a model folder that `from_pretrained` reads: all but the encoder. CheckpointError if it cannot."""
        folder = Path(folder)
        parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {"codec": (self.codec, self.content)}
        if self._prior is not None:
            parts["prior"] = (self._prior.model, self._prior.content)
        for name, (module, content) in parts.items():
            if not content:
                raise CheckpointError(
                    f"the {name} cannot be saved: it has no description",
                    "the pipeline was made from modules in memory",
                    "give the content of its config.json when making the pipeline",
                    DOCS,
                )
            weights = dict(module.named_parameters())  # names tied weights once
            more = text_files(self.prior.vocabulary, self.prior.tokenizer) if name == "prior" else None
            export_weights(folder / name, content, weights, more, dtype)
        write_index(folder, list(parts), self.encoder_config)

    @property
    def prior(self) -> LoadedPrior:
        """The prior with its vocabulary and latent statistics. CheckpointError while there is none."""
        if self._prior is None:
            raise CheckpointError(
                "this model has no prior yet",
                "only the codec is trained: it reconstructs pictures, but reads and writes no text",
                "let the training reach the end of a prior stage",
                DOCS,
            )
        return self._prior

    @property
    def layouts(self) -> Layouts:
        """How prompts become tokens: the training's own code. CheckpointError while there is no prior."""
        if self._layouts is None:
            self._layouts = Layouts(self.prior.vocabulary, self.prior.model.config)
        return self._layouts

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 25,
        guidance: float = 3.0,
        solver: Solver = "euler",
        decoder_steps: int = 8,
        grid: tuple[int, int] | None = None,
        decoder_guidance: float = 1.0,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        renorm: Renorm = "none",
        renorm_min: float = 0.0,
        times: Sequence[float] = (),
    ) -> list[Image.Image]:
        """A picture per prompt.

        seeds: one for all, or one per prompt. steps, decoder_steps: solver steps of the prior and of the decoder.
        times: of the prior, instead of `steps`; they rise from 0 to 1.
        guidance: v = v_uncond + guidance (v_cond - v_uncond); 1 = the prompt alone, 0 = no prompt.
        guidance_interval, renorm, renorm_min: see `Guidance`.
        grid: rows and columns of latents, by default those of a square picture. decoder_guidance: as in `decode`.
        ConfigError: empty or too long prompt, wrong number of seeds. CheckpointError: no prior yet.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        scales = Guidance(guidance, 1.0, guidance_interval, renorm, renorm_min)
        how = Drawing(steps, scales, solver, times, decoder_steps, decoder_guidance)
        return self.draw([self.asking(prompt) for prompt in prompts], seeds, how, grid)

    def edit(
        self,
        images: Input | Sequence[Input],
        instruction: str,
        seeds: int = 0,
        steps: int = 25,
        guidance: float = 3.0,
        image_guidance: float = 1.5,
        solver: Solver = "euler",
        decoder_steps: int = 8,
        grid: tuple[int, int] | None = None,
        decoder_guidance: float = 1.0,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        renorm: Renorm = "none",
        renorm_min: float = 0.0,
        times: Sequence[float] = (),
    ) -> Image.Image:
        """One picture drawn after `instruction` about one or several images, in their order.

        image_guidance: v = v_noimages + image_guidance (v - v_noimages), also where `guidance` is 1.
        grid: by default that of the first image's latents. Other arguments as in `__call__`.
        ConfigError: no image, empty or too long instruction. CheckpointError: no prior yet.
        """
        given = [images] if isinstance(images, Image.Image | EncodedImage) else list(images)
        if not given:
            raise ConfigError("no image to edit", "an edit has one or several references", "give an image", DOCS)
        scales = Guidance(guidance, image_guidance, guidance_interval, renorm, renorm_min)
        how = Drawing(steps, scales, solver, times, decoder_steps, decoder_guidance)
        return self.draw([self.asking(instruction, given)], seeds, how, grid)[0]

    def draw(
        self,
        dialogues: Sequence[Dialogue],
        seeds: int | Sequence[int] = 0,
        how: Drawing = DEFAULT,
        grid: tuple[int, int] | None = None,
    ) -> list[Image.Image]:
        """A picture after each dialogue."""
        latents = self.draw_dialogues(dialogues, seeds, how, grid)
        return self.decode(latents, seeds, how.decoder_steps, how.solver, guidance=how.decoder_guidance)

    def draw_latents(
        self,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 25,
        guidance: float = 3.0,
        solver: Solver = "euler",
        grid: tuple[int, int] | None = None,
    ) -> list[Latents]:
        """The first half of `__call__`: un-normalised latents for each prompt and its seed."""
        how = Drawing(steps, Guidance(guidance), solver)
        return self.draw_dialogues([self.asking(prompt) for prompt in prompts], seeds, how, grid)

    def generate(
        self,
        dialogue: Dialogue,
        seed: int = 0,
        writing: Writing | None = None,
        drawing: Drawing | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Iterator[str | Drawn]:
        """The reply to a conversation, piece by piece: text as it is written, every picture once it is drawn.

        grid: of the latents of what is drawn, by default that of the image the user showed last, else of a square.
        ConfigError: an image is missing. CheckpointError: no prior yet.
        """
        drawing, chosen = drawing or DEFAULT, grid or self._grid_after(dialogue)
        number = 0
        for piece in reply(self.prior, self.layouts, dialogue, chosen, seed, writing, drawing):
            if isinstance(piece, str):
                yield piece
                continue
            latents = Latents(self.prior.stats.denormalise(piece.cpu()), chosen)
            steps, solver, scale = drawing.decoder_steps, drawing.solver, drawing.decoder_guidance
            picture = self.decode([latents], seed + number, steps, solver, guidance=scale)[0]
            yield Drawn(picture, latents, Seen(None, chosen, piece.cpu(), chosen))
            number += 1

    def understand(self, image: Input, max_tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
        """A caption of a picture, or of features that were computed before; the likeliest words at temperature 0."""
        return self.captions([image], max_tokens, temperature, seed)[0]

    @torch.no_grad()
    def captions(
        self, images: Sequence[Input], max_tokens: int = 48, temperature: float = 0.0, seed: int = 0, top_p: float = 1.0
    ) -> list[str]:
        """A caption per picture; see `understand`. `seed`: of each."""
        prior, vocabulary = self.prior.model, self.prior.vocabulary
        stop = {vocabulary.control["<|im_end|>"], vocabulary.control["<|endoftext|>"]}
        asked = Words(INSTRUCTION)
        shown = [Dialogue((Message("user", ("0", asked)),), {"0": seen}) for seen in self.seen(images)]
        captions: list[str] = []
        for start in range(0, len(shown), self.batch):
            contents = [
                item.content(self.layouts, prior.config.understanding) for item in shown[start : start + self.batch]
            ]
            batch = collate(contents, prior.latent_channels, prior.read_channels).to(self.device)
            choose = Chooser([seed] * len(contents), temperature, top_p)
            rows = prior.generate_tokens(prior.encode_prefix(batch), stop, max_tokens, choose)
            captions += [vocabulary.decode(row).strip() for row in rows]
        return captions

    def seen(self, images: Sequence[Input]) -> list[Seen]:
        """Images as a dialogue shows them: features, and latents as the prior knows them."""
        encoded = self.features(images)
        return [
            Seen(features_tensor(item), item.grid, self.prior.stats.normalise(values), grid)
            for item, (values, grid) in zip(encoded, self.encode(encoded), strict=True)
        ]

    def asking(self, text: str, images: Sequence[Input] = ()) -> Dialogue:
        """A turn of a user: images and words. ConfigError: words that are empty or too long."""
        self.check_text(text)
        shown = {str(number): seen for number, seen in enumerate(self.seen(images) if images else [])}
        return Dialogue((Message("user", (*shown, Words(text))),), shown)

    def draw_dialogues(
        self,
        dialogues: Sequence[Dialogue],
        seeds: int | Sequence[int] = 0,
        how: Drawing = DEFAULT,
        grid: tuple[int, int] | None = None,
    ) -> list[Latents]:
        """Un-normalised latents after each dialogue; those of one grid, with images or without, in common batches."""
        seeds = seeds_for(seeds, len(dialogues))
        alike: dict[tuple[tuple[int, int], bool], list[int]] = {}
        for number, dialogue in enumerate(dialogues):
            alike.setdefault((grid or self._grid_after(dialogue), dialogue.shows), []).append(number)
        drawn: dict[int, Latents] = {}
        for (chosen, _), numbers in alike.items():
            for start in range(0, len(numbers), self.batch):
                some = numbers[start : start + self.batch]
                batch, own_seeds = [dialogues[number] for number in some], [seeds[number] for number in some]
                z = draw(self.prior.model, self.layouts, batch, own_seeds, chosen, how)
                latents = self.prior.stats.denormalise(z).cpu()
                drawn.update((number, Latents(values, chosen)) for number, values in zip(some, latents, strict=True))
        return [drawn[number] for number in range(len(dialogues))]

    def _grid_after(self, dialogue: Dialogue) -> tuple[int, int]:
        """Of the first image that the user's last turn with images shows; else of a square picture."""
        for message in reversed(dialogue.messages):
            if message.role == "user" and message.shows:
                return dialogue.image(next(part for part in message.parts if isinstance(part, str))).latent_grid
        return self.codec.config.compressor.latent_grid(default_grid(self.encoder_config))

    def check_text(self, prompt: str) -> None:
        """ConfigError: empty, or longer than what is read."""
        if not prompt.strip():
            raise ConfigError("a prompt is empty", "there is nothing to draw", "say what to draw", DOCS)
        length = len(self.prior.vocabulary.encode(prompt))
        if length > MAX_PROMPT_TOKENS:
            raise ConfigError(
                f"the prompt {prompt[:40]!r}… has {length} tokens",
                f"at most {MAX_PROMPT_TOKENS} are read, and cutting it unseen would draw something else",
                "shorten it",
                DOCS,
            )
