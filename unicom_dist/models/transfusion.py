"""The prior: one transformer that reads text and image features, predicts text, and denoises image latents.

Text enters by the embedding, image features (alone or beside the latents) by a two-layer connector, noised latents by a
linear map plus embeddings of time and place. The language head reads the labels' positions, the flow head the latents'.
Every tower runs on every batch, also on zero rows, so that ranks with different modalities stay in step.
A pipeline's rank holds a `Part`; which positions a rank computes on is up to its `share` (in one process, all).
Shapes as in `segments.py`: S positions, T tokens, Y labels, N latents of d channels, M features of D channels, h width.
Time: t = 1 is data. Ref: UniCom arXiv 2603.10702, section 3.3.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.attention import Attend, Take, rearrange
from unicom_dist.models.backbone import INITIAL_STD, WHOLE, Part, Qwen2
from unicom_dist.models.cache import AfterPrefix, Prefix, Recorder
from unicom_dist.models.flow import interpolate, preconditioned_velocity
from unicom_dist.models.init import fill, initial
from unicom_dist.models.layers import RMSNorm, TimeEmbedding, at_grid, grid_table
from unicom_dist.models.segments import PackedBatch, centred
from unicom_dist.models.share import Share
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.mesh import Mesh


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens [P] of logits [P, V]."""
    return logits.argmax(-1)


def initial_weight(piece: Piece, seed: int) -> Tensor:
    """A piece of a new model (with its seed, a `Source`). The flow head starts at zero, as it knows nothing."""
    if piece.name == "flow_head.out.weight":
        return torch.zeros(piece.cut)
    return initial(piece, seed, INITIAL_STD if piece.name.startswith("backbone.") else 0.0)


class Connector(nn.Module):
    """What is read of an image to the backbone's width: Linear, GELU, Linear."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(features, width)
        self.act = nn.GELU()
        self.out = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[M, D] -> [M, h]."""
        out: Tensor = self.out(self.act(self.lift(features)))
        return out


class FlowHead(nn.Module):
    """What `prior.prediction` says, from hidden states."""

    def __init__(self, width: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.out = nn.Linear(width, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, h] -> [N, d]."""
        output: Tensor = self.out(self.norm(hidden))
        return output


class Transfusion(nn.Module):
    """Backbone, the ways in and the ways out, or a part of them. `seed` alone decides the initial weights.

    On the meta device it has shapes but no weights. Raises: ConfigError if the width does not fit the position table.
    """

    places: Tensor

    def __init__(
        self,
        config: PriorConfig,
        vocab_size: int,
        latent_channels: int,
        feature_channels: int,
        seed: int = 0,
        part: Part = WHOLE,
    ) -> None:
        super().__init__()
        if config.hidden % 4:
            raise ConfigError(
                f"prior.hidden = {config.hidden}",
                "the 2-D position table needs sines and cosines of rows and columns: a multiple of 4",
                f"prior.hidden = {config.hidden // 4 * 4} or {config.hidden // 4 * 4 + 4}",
            )
        self.config, self.part = config, part
        self.share = Share(Mesh(0, 1, torch.device("cpu")))
        self.latent_channels, self.feature_channels = latent_channels, feature_channels
        self.backbone = Qwen2(config, vocab_size, seed, "backbone.", part)
        if part.first:
            self.latent_in = nn.Linear(latent_channels, config.hidden)
            self.time = TimeEmbedding(config.hidden)
            self.connector = Connector(self.read_channels, config.hidden)
            with torch.device("cpu"):  # computed, not drawn: also there while the weights are not
                self.register_buffer("places", grid_table(config.max_grid, config.hidden), persistent=False)
        if part.last:
            self.flow_head = FlowHead(config.hidden, latent_channels, config.norm_eps)
        for name, tower in self.named_children():
            if name != "backbone":
                fill(tower, partial(initial_weight, seed=seed), f"{name}.")

    @property
    def read_channels(self) -> int:
        """D of the batches: channels of what stands for an image that is read."""
        return self.config.read_channels(self.feature_channels, self.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything between the borders is computed."""
        return next(self.parameters()).dtype

    def train_only(self, part: Literal["all", "connector"]) -> None:
        """Choose what the optimizer may move: everything, or the ways in and out of the images alone."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part == "all" or not name.startswith("backbone."))

    def place(self, grid: Tensor) -> Tensor:
        """Position vectors [..., h] of (row, column) [..., 2]. DataError beyond `max_grid` (checked on CPU tensors)."""
        if grid.device.type == "cpu" and grid.numel() and int(grid.max()) >= self.config.max_grid:
            raise DataError(
                f"an image grid reaches row or column {int(grid.max())}",
                f"the position table covers prior.max_grid = {self.config.max_grid}",
                f"prior.max_grid = {int(grid.max()) + 1} or more, or encoder.max_patches smaller",
            )
        return at_grid(self.places.to(self.dtype), grid)

    def embed_latents(self, z_t: Tensor, t: Tensor, grid: Tensor) -> Tensor:
        """Input vectors [..., h] of noised latents z_t [..., d] at times t [...] and places [..., 2].

        Without the times where these have a token of their own, without the places where attention knows them.
        """
        vectors: Tensor = self.latent_in(z_t.to(self.dtype))
        if self.config.time_injection == "add":
            vectors = vectors + self.time(t)
        return self._placed(vectors, grid)

    def _placed(self, vectors: Tensor, grid: Tensor) -> Tensor:
        return vectors + self.place(grid) if self.config.positions == "shared" else vectors

    def velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Velocity [..., d] float32 of what a flow head made of z_t [..., d] at times t [...], both float32.

        No gradient passes to z_t here: where it was drawn from trained latents, it would be one through the target.
        """
        output = output.float()
        return output if self.config.prediction == "velocity" else preconditioned_velocity(output, z_t.detach(), t)

    def embed(self, batch: PackedBatch, text: Tensor) -> Tensor:
        """Input vectors [S, h] of all positions, given those of the tokens [T, h]; padding is zero."""
        z_t = interpolate(batch.latents.float(), batch.noise.float(), batch.t.float())
        latents = self.embed_latents(z_t, batch.t, batch.latent_grid)
        features = self._placed(self.connector(batch.features.to(self.dtype)), batch.feature_grid)
        rows, places = [text, latents, features], [batch.token_index, batch.latent_index, batch.feature_index]
        if self.config.time_injection == "token":
            rows.append(self.time(batch.times))
            places.append(batch.time_index)
        padding = batch.num_positions - sum(len(place) for place in places)
        if padding:
            rows.append(text.new_zeros(padding, text.shape[1]))
            places.append(torch.arange(batch.num_positions - padding, batch.num_positions, device=text.device))
        where = torch.cat(places)
        back = torch.empty_like(where)
        back.index_copy_(0, where, torch.arange(where.shape[0], device=where.device))
        return rearrange(torch.cat(rows), back, where)

    def hidden(self, batch: PackedBatch, attend: Attend) -> Tensor:
        """Hidden states [S, h] after the final norm, all positions of the batch in this process."""
        x = self.embed(batch, self.backbone.model.embed_tokens(batch.token_ids))
        hidden: Tensor = self.backbone.model(x, batch.rope_positions, attend)
        return hidden

    def forward(self, batch: PackedBatch, x: Tensor | None = None, chunk: int = 0) -> Any:
        """Cross-entropy [Y] of the labels, nats, and velocity [F, d] at the latents being denoised, both float32.

        Where the language head has a `z_loss`, third log^2 Z [Y] of the labels.
        In a share of the batch: of the labels and latents in its region. In a part of the model: `x` is what the part
        before returned (None at the beginning of the model), and before the end hidden states are returned. Both are
        [n, h], n = `share.rows(batch)`. Collective over tp and ulysses, in forward and in backward.
        """
        share, backbone = self.share, self.backbone
        region, attend = share.region(batch), share.attend(batch, self.dtype)
        if x is None:
            mine = share.slice_of(region)
            x = self.embed(mine, share.text(backbone.model.embed_tokens, region, mine))
        hidden = backbone.model(x, region.rope_positions, attend, chunk)
        if not backbone.model.ends(chunk):
            return hidden
        drawn = region.latent_index[region.flow_index]
        index = torch.cat([region.label_index, drawn])
        rows = Take.apply(share.gather(hidden), index)  # type: ignore[no-untyped-call]
        labels, latents = torch.split(rows, [region.label_index.shape[0], drawn.shape[0]])
        text = backbone.lm_head(labels, region.label_ids)
        velocity = self.velocity(self.flow_head(latents), *region.denoised())
        if not backbone.lm_head.z_loss:
            return text, velocity
        losses, squares = text
        return losses, velocity, squares

    @torch.no_grad()
    def encode_prefix(self, batch: PackedBatch) -> Prefix:
        """Read prefixes once: a batch of text and clean images, one sample per prefix, without noised latents."""
        recorder = Recorder(batch, self.dtype)
        hidden = self.hidden(batch, recorder)
        return recorder.prefix(batch.rope_positions, hidden)

    @torch.no_grad()
    def velocity_from_prefix(self, prefix: Prefix, z_t: Tensor, t: Tensor, grid: Tensor) -> Tensor:
        """Velocity [P, n, d] float32 of one image after each prefix; equals `forward` on prefix and image together.

        z_t [P, n, d] noised latents, t [P], grid [n, 2] or [P, n, 2].
        """
        count, new = z_t.shape[:2]
        grid = grid.expand(count, new, 2)
        x = self.embed_latents(z_t, t[:, None].expand(count, new), grid)
        positions = prefix.next_position[:, None].expand(count, new, *prefix.next_position.shape[1:])
        if self.config.positions == "rope2d":
            positions = positions + centred(grid)
        if self.config.time_injection == "token":
            x = torch.cat([self.time(t)[:, None], x], 1)
            positions = torch.cat([prefix.next_position[:, None], positions], 1)
        hidden = self.backbone.model(x.flatten(0, 1), positions.flatten(0, 1), AfterPrefix(prefix, x.shape[1]))
        output = self.flow_head(hidden.unflatten(0, (count, -1))[:, -new:])
        return self.velocity(output, z_t.float(), t.float()[:, None].expand(count, new))

    @torch.no_grad()
    def next_logits(self, prefix: Prefix) -> Tensor:
        """What follows each prefix, [P, V] float32."""
        logits: Tensor = self.backbone.lm_head.logits(prefix.last_hidden).float()
        return logits

    @torch.no_grad()
    def append_tokens(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        """The prefixes, each with one of `tokens` [P] at its end; they share the buffers."""
        after = AfterPrefix(prefix, 1)
        return after.grown(self.backbone.model(self.backbone.model.embed_tokens(tokens), prefix.next_position, after))

    def generate_tokens(
        self,
        prefix: Prefix,
        stop_ids: Collection[int],
        limit: int,
        choose: Callable[[Tensor], Tensor] = greedy,
    ) -> list[list[int]]:
        """Continue each prefix by at most `limit` tokens, up to and without the first of `stop_ids`.

        `choose` takes logits [P, V] to tokens [P], by default the likeliest.
        """
        texts: list[list[int]] = [[] for _ in range(prefix.last_hidden.shape[0])]
        running = set(range(len(texts)))
        prefix.reserve(limit)
        for _ in range(limit):
            chosen = choose(self.next_logits(prefix))
            for number, token in enumerate(chosen.tolist()):
                if number in running and token in stop_ids:
                    running.discard(number)
                elif number in running:
                    texts[number].append(token)
            if not running:
                break
            prefix = self.append_tokens(prefix, chosen)
        return texts
