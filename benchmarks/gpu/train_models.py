"""What the training benchmark trains: our prior, and transformers' model in the same step of the trainer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from train_rows import FEATURE_CHANNELS, LATENT_CHANNELS, Size

from unicom_dist.config.layout import Layout
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import KernelsConfig, PriorConfig
from unicom_dist.models import functions
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.init import Source, fill, generator_for
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.train.ema import Ema
from unicom_dist.train.execution import Execution, LossSums
from unicom_dist.train.loop import add_up, make_engine
from unicom_dist.train.prior import PriorTask
from unicom_dist.train.watchdog import Watchdog

LR = 1e-5
PLAIN, FLEX, COMPILED, BOTH = "plain", "flex_attention", "compile", "flex_attention + compile"


@dataclass(frozen=True)
class Tokens:
    """All that a step asks of a vocabulary."""

    size: int


class Shaped(PriorTask):
    """The trainer's prior task without data on disk."""

    def __init__(self, size: Size, prior: PriorConfig, device: torch.device) -> None:
        precision = "bfloat16" if device.type == "cuda" else "float32"
        config = load_recipe("tiny").config
        off = KernelsConfig(**dict.fromkeys(KernelsConfig.model_fields, "off"))
        self.config = config.model_copy(update={"prior": prior, "kernels": off})
        stage = next(stage for stage in config.stages if stage.kind == "prior")
        self.stage = stage.model_copy(update={"precision": precision, "trainable": "all"})
        self._device, self._channels = device, FEATURE_CHANNELS
        vocabulary: Any = Tokens(size.vocabulary)
        self._vocabulary = vocabulary
        self._stats = LatentStats(torch.zeros(LATENT_CHANNELS), torch.ones(LATENT_CHANNELS))

    @property
    def source(self) -> Source:  # drawn where it is quick
        """Weights of the shape's usual spread, by name: the peer has the same."""

        def draw(piece: Piece) -> Tensor:
            if len(piece.shape) < 2:
                return torch.zeros(piece.cut) if piece.name.endswith("bias") else torch.ones(piece.cut)
            seed = generator_for(0, piece.name).initial_seed()
            generator = torch.Generator(self._device).manual_seed(seed)
            return piece.of(torch.randn(piece.shape, generator=generator, device=self._device) * 0.02)

        return draw


class Causal(nn.Module):
    """transformers' model: a row of one document in, the sum of its labels' losses out."""

    def __init__(self, prior: PriorConfig, vocabulary: int, recompute: bool) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=prior.hidden,
            intermediate_size=prior.ffn,
            num_hidden_layers=prior.layers,
            num_attention_heads=prior.heads,
            num_key_value_heads=prior.kv_heads,
            max_position_embeddings=32_768,
            rms_norm_eps=prior.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": prior.rope_theta},
            tie_word_embeddings=prior.tie_embeddings,
            attn_implementation="sdpa",
        )
        self.backbone = Qwen2ForCausalLM(config)
        if recompute:
            self.backbone.gradient_checkpointing_enable()
        self.train()

    def forward(self, batch: PackedBatch) -> Tensor:
        labels = batch.label_ids[None]
        out = self.backbone(
            batch.token_ids[None], labels=labels, shift_labels=labels, num_items_in_batch=1, use_cache=False
        )
        loss: Tensor = out.loss
        return loss


class Peer(Shaped):
    """transformers' model in the trainer's step."""

    def build(self, mesh: Mesh) -> nn.Module:
        with mesh.device:
            module = Causal(self.config.prior, self._vocabulary.size, mesh.layout.recompute == "full")
        fill(module, self.source)
        return module

    def terms(self, outputs: Any, batch: PackedBatch) -> dict[str, LossTerm]:
        return {"text": LossTerm(outputs, len(batch.label_ids), self.stage.lambda_text)}

    def boundaries(self, batch: PackedBatch) -> list[Boundary]:
        return []


class Trainer:
    """Model and engine of a task; `step` is one of training."""

    def __init__(self, task: Shaped, layout: Layout, device: torch.device) -> None:
        self.task, self.mesh = task, Mesh(0, 1, device, layout)
        self.engine = make_engine(task, task.config, task.stage, self.mesh)
        self.ema = Ema(self.engine.state(), task.stage.ema)
        self.execution = Execution(task, self.engine, self.mesh, Watchdog())
        self.sums = LossSums()

    def step(self, batches: Sequence[PackedBatch]) -> float:
        """The gradient's norm."""
        counts: dict[str, float] = {}
        for batch in batches:
            add_up(counts, self.task.counts(batch))
        on_device = [batch.to(self.mesh.device) for batch in batches]
        whole = {name: int(value) for name, value in counts.items()}
        self.execution.train(on_device, whole, self.sums.add)
        norm = self.engine.step(LR)
        self.ema.update()
        return norm

    def first(self, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """Nats per label of the first step, and its gradient's norm."""
        norm = self.step(batches)
        nats = self.sums.take(["text"], self.mesh)["text"][0]
        return nats / sum(len(batch.label_ids) for batch in batches), norm


@contextmanager
def kernels(trainer: Trainer, compiled: dict[str, Callable[..., Any]], name: str) -> Iterator[None]:
    """Within the block the model computes with the kernels of that row."""
    plain, share = dict(functions._FORMS), cast(Transfusion, trainer.engine.module).share
    if COMPILED in name:
        functions._FORMS.update(compiled)
    share.flex = FLEX in name
    try:
        yield
    finally:
        functions._FORMS.update(plain)
        share.flex = False


def compiled_forms() -> dict[str, Callable[..., Any]]:
    """The functions that `kernels` puts in the place of the plain ones."""
    plain = dict(functions._FORMS)
    functions.compile_all()
    forms = dict(functions._FORMS)
    functions._FORMS.update(plain)
    return forms
