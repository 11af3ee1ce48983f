"""UniComPipeline: text to pictures, pictures to text, pictures to pictures.

Drawing is two flows in a row: the prior draws latents for a prompt, the decoder draws pixels for the latents. Each
picture has a seed, from which the noise of both flows is drawn on the CPU: it does not depend on its neighbours in a
batch.
Shapes: P pictures, n latents of d channels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import export_weights
from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.data.samples import Arrays, Content, Layout, Layouts, collate, grid_positions
from unicom_dist.models.codec import Codec
from unicom_dist.models.target import Target
from unicom_dist.sample.export import text_files, write_index
from unicom_dist.sample.loading import LoadedPrior, check_pair, default_grid, find_parts, load_codec, load_prior
from unicom_dist.sample.pictures import DOCS, Input, Latents, PictureCodec, features_tensor, seeds_for
from unicom_dist.sample.solver import Solver, integrate, noise_from_seeds, time_grid

MAX_PROMPT_TOKENS = 1024  # no row of training is longer by default


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
            self._layouts = Layouts(self.prior.vocabulary)
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
    ) -> list[Image.Image]:
        """A picture per prompt.

        seeds: one for all, or one per prompt. steps, decoder_steps: solver steps of the prior and of the decoder.
        guidance: v = v_uncond + guidance (v_cond - v_uncond); 1 = the prompt alone, 0 = no prompt.
        grid: rows and columns of latents, by default those of a square picture. decoder_guidance: as in `decode`.
        ConfigError: empty or too long prompt, wrong number of seeds. CheckpointError: no prior yet.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = seeds_for(seeds, len(prompts))
        latents = self.draw_latents(prompts, seeds, steps, guidance, solver, grid)
        return self.decode(latents, seeds, decoder_steps, solver, guidance=decoder_guidance)

    @torch.no_grad()
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
        seeds = seeds_for(seeds, len(prompts))
        for prompt in prompts:
            self._check_prompt(prompt)
        drawn: list[Latents] = []
        for start in range(0, len(prompts), self.batch):
            chosen = slice(start, start + self.batch)
            drawn += self._draw(prompts[chosen], seeds[chosen], steps, guidance, solver, grid)
        return drawn

    def understand(self, image: Input, max_tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
        """A caption of a picture, or of features that were computed before; the likeliest words at temperature 0."""
        return self.captions([image], max_tokens, temperature, seed)[0]

    @torch.no_grad()
    def captions(
        self, images: Sequence[Input], max_tokens: int = 48, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """A caption per picture; see `understand`."""
        prior, vocabulary = self.prior.model, self.prior.vocabulary
        stop = {vocabulary.control["<|im_end|>"], vocabulary.control["<|endoftext|>"]}
        generator = torch.Generator(self.device).manual_seed(seed) if temperature > 0 else None
        encoded = self.features(images)
        captions: list[str] = []
        for start in range(0, len(encoded), self.batch):
            contents = [
                Content("", self.layouts.image_to_text("", item.grid), [Arrays(features_tensor(item))])
                for item in encoded[start : start + self.batch]
            ]
            batch = collate(contents, prior.latent_channels, prior.feature_channels).to(self.device)
            rows = prior.generate_tokens(prior.encode_prefix(batch), stop, max_tokens, temperature, generator)
            captions += [vocabulary.decode(row).strip() for row in rows]
        return captions

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        solver: Solver,
        grid: tuple[int, int] | None,
    ) -> list[Latents]:
        """`draw_latents` of one batch: both branches of the guidance go through the prior together."""
        prior = self.prior.model
        rows, columns = grid or self.codec.config.compressor.latent_grid(default_grid(self.encoder_config))
        both = guidance not in (0, 1)
        branches = list(prompts) if guidance else [""] * len(prompts)
        branches += [""] * len(prompts) if both else []
        prefixes = [Content("", before_image(self.layouts.text_to_image(text, (rows, columns)))) for text in branches]
        batch = collate(prefixes, prior.latent_channels, prior.feature_channels).to(self.device)
        prefix = prior.encode_prefix(batch)
        places = grid_positions(rows, columns).to(self.device)

        def velocity(z: Tensor, t: float) -> Tensor:
            z = torch.cat([z, z]) if both else z
            v = prior.velocity_from_prefix(prefix, z, z.new_full((len(z),), t), places)
            if not both:
                return v
            conditional, unconditional = v.chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        noise = noise_from_seeds(seeds, (rows * columns, prior.latent_channels), "prior").to(self.device)
        z = integrate(velocity, noise, time_grid(steps, prior.config.timestep_shift), solver)
        return [Latents(values, (rows, columns)) for values in self.prior.stats.denormalise(z).cpu()]

    def _check_prompt(self, prompt: str) -> None:
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


def before_image(layout: Layout) -> Layout:
    """The part of a text-to-image layout after which the image is drawn."""
    start = layout.images[0].start
    none, index = np.zeros(0, np.int64), np.arange(start)
    prefix = replace(layout, task="text", segments=(("causal", start),), tokens=layout.tokens[:start], images=())
    return replace(prefix, token_index=index, rope=index, label_index=none, label_ids=none)
