"""The configuration: one tree of typed sections, read from a recipe.

Every field says its unit. Unknown keys are refused (`load.py` names the nearest one). Cross-field rules that need more than one
section are validators of the section that holds both. Imports no torch.
"""

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from unicom_dist.config.layout import Layout, Recompute, Schedule, refusals

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Switch = Literal["auto", "on", "off"]
EDITS = "edits"  # the set of edits that ingest makes


class Unworkable(ValueError):
    """Values that are fine one by one but cannot work together: what, why, and what would."""

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(f"{what}: {why}; {remedy}")
        self.parts = (what, why, remedy)


class Section(BaseModel):
    """A strict, immutable part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


def _multiples(value: int, unit: int) -> str:
    """The multiples of `unit` next to `value`, for error texts."""
    below = value // unit * unit
    return " or ".join(str(number) for number in (below, below + unit) if number > 0)


def _divisors(value: int) -> str:
    return ", ".join(str(number) for number in range(1, value + 1) if value % number == 0)


def held_out_set(name: str) -> str:
    """The set that is to a set of conversations what heldout/ is to train/."""
    return f"{name}-heldout"


class DataConfig(Section):
    """Image-text pairs and where their shards are."""

    source: str = Field("fluent-emoji", description="`fluent-emoji`, a folder, a .csv/.jsonl/.parquet table, or a glob of tars")
    path: str = Field("data/fluent-emoji", description="folder of the shard sets train/, augmented/ and heldout/")
    image_px: PositiveInt = Field(256, description="longest side of the stored images, pixels")
    held_out: Fraction = Field(0.08, description="share of the keys kept for evaluation, chosen by key hash")
    augmented_views: int = Field(0, ge=0, description="further views per training image (background, scale, shift, flip)")
    edits: int = Field(0, ge=0, description="edits (recolour, mirror, crop, compose) made from the training images, as the set edits/; a fifth as many from held-out ones, as edits-heldout/")
    shard_samples: PositiveInt = Field(512, description="samples per tar")
    languages: list[str] = Field(["en"], description="CLDR languages the captions are taken from")
    conversations: dict[str, Literal["image_text_to_image", "interleaved"]] = Field(
        default_factory=dict, description="further sets under `path` whose samples are conversations or documents, and the task they are of"
    )
    limit: int = Field(0, ge=0, description="use only the first N images of the source; 0 = all")
    max_bad_fraction: Fraction = Field(0.01, description="stop when more than this share of the samples is malformed")

    @property
    def further_sets(self) -> list[str]:
        """Names of the sets of conversations, each followed by its held-out one; not all of them need be there."""
        names = dict.fromkeys([*self.conversations, *([EDITS] if self.edits else [])])
        return [each for name in names for each in (name, held_out_set(name))]


class EncoderConfig(Section):
    """The frozen image encoder."""

    kind: Literal["siglip2", "efficientnet-lite2", "random"] = Field("siglip2", description="`random` is for tests only")
    path: str = Field("", description="folder or hub id of the published weights")
    levels: Literal["last", "pyramid"] = Field("last", description="pyramid: four depths of efficientnet-lite2 side by side, as many channels")
    image_px: PositiveInt = Field(256, description="side of the square view for encoders with a fixed grid, pixels")
    max_patches: PositiveInt = Field(1024, description="most patches per image (NaFlex encoders keep the aspect ratio)")
    crop: Literal["none", "bucket"] = Field("none", description="bucket: see only the part that codec.decoder.buckets: aspect draws; goes with it")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the forward pass")
    batch: PositiveInt = Field(32, description="images per forward pass")

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if self.levels == "pyramid" and self.kind != "efficientnet-lite2":
            raise ValueError(f"levels = pyramid exists for efficientnet-lite2 only; kind = {self.kind} has levels = last")
        if self.crop == "bucket" and self.kind == "efficientnet-lite2":
            raise Unworkable(
                "crop = bucket with kind = efficientnet-lite2",
                "it sees squares, whatever the shape of the picture",
                "use kind: siglip2, or crop: none",
            )
        return self


class FeaturesConfig(Section):
    """The Ray job that writes feature tars."""

    workers: int = Field(0, ge=0, description="Ray actors; 0 = one per GPU, or one per core without GPUs")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="stored precision")


class CompressorConfig(Section):
    """Channels narrowed, tokens kept; or, for comparison, fewer tokens."""

    kind: Literal["attention", "mlp", "identity"] = Field("attention", description="how channels are narrowed; `identity` keeps them all")
    channels: PositiveInt = Field(64, description="latent channels d")
    heads: PositiveInt = Field(18, description="attention heads")
    attention_width: int = Field(0, ge=0, description="total width of q, k and v; 0 = the wider of input and output, heads averaged when narrowing")
    expanded: int = Field(0, ge=0, description="channels the decompressor widens to; 0 = the encoder's channels")
    mlp_ratio: NonNegative = Field(2.0, description="hidden width of the gated MLP over the output width; 0 = no MLP")
    spatial: Literal["none", "pool", "resampler"] = Field("none", description="2 x 2 tokens become one: their mean (pool), or what a learned query reads of them")
    bottleneck: Literal["none", "tanh", "kl"] = Field("none", description="tanh: latents within -1 and 1; kl: a Gaussian posterior, sampled in training, its mean elsewhere")
    start: Literal["random", "linear"] = Field("random", description="where a first codec stage starts; linear: its linear path at the best linear guess of the pictures, computed in seconds")
    kl_weight: NonNegative = Field(1e-4, description="bottleneck kl: weight of the posterior's divergence from N(0, 1), nats per latent channel")

    @model_validator(mode="after")
    def _identity(self) -> Self:
        if self.start == "linear" and self.kind != "attention":
            raise Unworkable(f"start = linear with kind = {self.kind}", "only the attention block has a linear path", "use kind: attention, or start: random")
        if self.kind == "identity" and self.bottleneck != "none":
            raise Unworkable(
                f"bottleneck = {self.bottleneck} with kind = identity",
                "an identity leaves the values of the channels as they are",
                "use kind: attention or mlp, or bottleneck: none",
            )
        return self

    def latent_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the latents of an image with features on `grid`; cells at an odd edge are not full."""
        return grid if self.spatial == "none" else (-(-grid[0] // 2), -(-grid[1] // 2))


class DecoderConfig(Section):
    """FLUX-style diffusion decoder over patches of pixels or of a VAE's latents."""

    space: Literal["pixels", "vae"] = Field("pixels", description="what is drawn: pixels (in patches with patch_px > 1) or a frozen VAE's latents, which it decodes")
    vae_path: str = Field("", description="folder of the VAE (diffusers AutoencoderKL or AutoencoderTiny), or the published folder with vae/ in it")
    vae_channels: PositiveInt = Field(16, description="channels of the VAE's latents; FLUX: 16")
    vae_scale: PositiveInt = Field(8, description="pixels per side of a cell of the VAE's latents; FLUX: 8")
    vae_tile_px: int = Field(0, ge=0, description="decode larger pictures in overlapping tiles of this side, pixels; 0 = whole")
    image_px: PositiveInt = Field(64, description="side of the decoded image, pixels; buckets aspect: of the square one")
    buckets: Literal["square", "aspect"] = Field(
        "square", description="aspect: 33 shapes from 1:4 to 4:1, all of about image_px x image_px pixels; square: white at the sides"
    )
    patch_px: PositiveInt = Field(4, description="side of a patch, pixels; space vae: cells (FLUX: 2)")
    init_from: str = Field("", description="folder of a published FluxTransformer2DModel, or one with transformer/ in it; empty = random initialisation")
    double_blocks: int = Field(2, ge=0, description="blocks with separate image and token streams")
    single_blocks: int = Field(4, ge=0, description="blocks with one joint stream")
    heads: PositiveInt = Field(4, description="attention heads")
    head_dim: PositiveInt = Field(64, description="channels per head; width = heads x head_dim")
    rope_axes: tuple[int, int, int] = Field((16, 24, 24), description="rotary channels per axis, sum = head_dim")
    prediction: Literal["velocity", "clean"] = Field("velocity", description="what the network outputs")
    token_positions: Literal["zero", "grid"] = Field("grid", description="rotary ids of the semantic tokens")
    concat_tokens: bool = Field(False, description="also append to each patch the token at its place, as FLUX.1 Fill does its mask")
    text_channels: int = Field(0, ge=0, description="channels where FLUX reads text (FLUX.1: 4096), reached by the projector; 0 = it reads the tokens as they are")
    projector: Literal["linear", "mlp"] = Field("linear", description="from tokens to text_channels: one linear map, or linear to three times as many, SiLU, linear (UniWorld-V1)")
    pooled_channels: PositiveInt = Field(8, description="channels of FLUX's pooled text vector (FLUX.1: 768), a constant here")
    pooled_path: str = Field("", description="safetensors file with that vector, e.g. CLIP's of an empty prompt; empty = zeros")
    guidance_embeds: bool = Field(False, description="the network has an input for the guidance it was distilled with (FLUX.1-dev)")
    guidance: NonNegative = Field(1.0, description="constant at that input, in training and drawing")
    trainable: Literal["all", "image-branch", "lora", "projector"] = Field(
        "all", description="what trains of the decoder, beside its projector: all, the image stream of every block, low-rank adapters, nothing"
    )
    lora_rank: PositiveInt = Field(16, description="trainable lora: rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="trainable lora: adapters are scaled by lora_alpha / lora_rank")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        unit = self.patch_px * (self.vae_scale if self.space == "vae" else 1)
        if self.image_px % unit:
            factors = f"vae_scale x patch_px = {unit}" if self.space == "vae" else f"patch_px = {self.patch_px}"
            raise Unworkable(
                f"image_px = {self.image_px}",
                f"it is not a multiple of {factors}",
                f"use {_multiples(self.image_px, unit)}, or another patch_px",
            )
        if sum(self.rope_axes) != self.head_dim:
            raise Unworkable(
                f"rope_axes = {list(self.rope_axes)}",
                f"the rotary channels sum to {sum(self.rope_axes)}, not to head_dim = {self.head_dim}",
                f"use even numbers that sum to {self.head_dim}",
            )
        if any(axis % 2 or axis < 2 for axis in self.rope_axes):
            raise Unworkable(f"rope_axes = {list(self.rope_axes)}", "rotary channels come in pairs", "use even numbers >= 2")
        return self

    @model_validator(mode="after")
    def _published(self) -> Self:
        if self.space == "vae" and not self.vae_path:
            raise Unworkable("space = vae", "vae_path names no folder to read the VAE from", "set vae_path, or space: pixels")
        if self.trainable != "all" and not self.init_from:
            raise Unworkable(f"trainable = {self.trainable}", "the frozen weights would stay random", "name published ones in init_from, or trainable: all")
        if self.projector == "mlp" and not self.text_channels:
            raise Unworkable("projector = mlp", "text_channels = 0 leaves nothing to project to", "set text_channels (FLUX.1: 4096), or projector: linear")
        return self


class CodecConfig(Section):
    """Compressor, decompressor and decoder, and the loss that trains them together."""

    compressor: CompressorConfig = CompressorConfig()
    decoder: DecoderConfig = DecoderConfig()
    latent_scale: Literal["channel", "shared"] = Field(
        "channel", description="what the prior divides latents by: each channel by its own deviation, or all by one, so that channels keep the weight they have in the picture"
    )
    latent_noise_tau: NonNegative = Field(0.0, description="decoder sees latents plus noise of std tau x U(0, 1), in latent stds")
    flow_remaining: Fraction = Field(0.0, description="c: the flow error is weighted by ((1-t) / max(1-t, c))^2; 0 = not weighted, 1 = error of the clean image")
    perceptual: Literal["none", "lpips-alex", "lpips-vgg", "efficientnet-lite2", "resnet50"] = Field(
        "lpips-alex", description="network of the perceptual loss term; not the encoder, and better none that evaluation measures with (lpips-vgg, resnet50)"
    )
    perceptual_path: str = Field("assets/lpips", description="folder of that network's safetensors, such as assets/lpips or assets/efficientnet-lite2")
    perceptual_weight: NonNegative = Field(0.5, description="lambda of the perceptual term, once it is fully on")
    perceptual_min_t: Fraction = Field(0.5, description="the perceptual term looks only at samples with t >= this (low noise)")
    perceptual_px: int = Field(0, ge=0, description="longer side at which the network sees the pictures, reduced or enlarged; space vae: side of the crop that is decoded for it; 0 = as they are")
    perceptual_start: int = Field(0, ge=0, description="steps of the stage before the perceptual term comes in")
    perceptual_ramp: int = Field(0, ge=0, description="steps over which its weight then rises")
    encoder_trainable: bool = Field(False, description="the encoder learns with the codec, held by self-distillation to the stored features, its own before; exported to run_dir/encoder")
    distill_weight: NonNegative = Field(1.0, description="lambda of that: mean squared difference of its tokens to the stored features")
    timestep: Literal["uniform", "logit-normal"] = Field("uniform", description="how t is drawn in training")
    timestep_shift: float = Field(1.0, gt=0, description="s in t' = 1 - s(1-t)/(1+(s-1)(1-t)); > 1 means more noise")
    resolution_shift: bool = Field(False, description="instead of timestep_shift: s = exp(mu), mu linear in the patches of a picture from (256, 0.5) to (4096, 1.15), as FLUX")
    condition_dropout: Fraction = Field(0.0, description="share of samples trained with the features of a black picture, for sample.decoder_guidance")


class PriorConfig(Section):
    """The Transfusion backbone (Qwen2.5 architecture) and its flow head."""

    init_from: str = Field("", description="folder of published Qwen2.5 weights; empty = random initialisation")
    tokenizer: str = Field("assets/qwen2.5-tokenizer", description="folder of the Qwen2.5 tokenizer")
    vocabulary: Literal["full", "trimmed"] = Field("full", description="`trimmed` keeps the ids of the training captions and all single bytes")
    vocabulary_pictures: PositiveInt = Field(1, description="trimmed: a token is kept when the texts of this many pictures use it, else spelled by smaller ones")
    hidden: PositiveInt = Field(896, description="model width")
    layers: PositiveInt = Field(24, description="decoder blocks")
    heads: PositiveInt = Field(14, description="query heads")
    kv_heads: PositiveInt = Field(2, description="key-value heads; divides `heads`")
    ffn: PositiveInt = Field(4864, description="width of the gated MLP")
    rope_theta: float = Field(1e6, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the RMS norms")
    tie_embeddings: bool = Field(True, description="the output head is the embedding, transposed")
    max_grid: PositiveInt = Field(64, description="latent rows and columns covered by the 2-D position table")
    understanding: Literal["raw", "dim_concat", "seq_concat"] = Field(
        "raw", description="what an image that is read enters as: encoder features; these with the latents beside them in channels; features, then latents, as twice the positions"
    )
    positions: Literal["shared", "rope2d"] = Field(
        "shared", description="of an image's positions: one rotary position and a frozen 2-D table added (BAGEL), or rotary rows and columns (HunyuanImage 3.0)"
    )
    time_injection: Literal["add", "token"] = Field("add", description="how an image being denoised learns t: added to every latent (BAGEL), or a position of its own before them (Show-o2)")
    prediction: Literal["velocity", "edm"] = Field(
        "velocity", description="what the flow head outputs: the velocity, or what the best linear guess of it leaves, at variance 1 (EDM's preconditioning); a small model learns faster from that"
    )
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, head by head; Qwen2.5 has none, so with init_from its gains start at 1")
    timestep: Literal["uniform", "logit-normal"] = Field("uniform", description="how t is drawn in training")
    timestep_shift: float = Field(1.0, gt=0, description="as codec.timestep_shift")
    resolution_shift: bool = Field(False, description="instead of timestep_shift: s = sqrt(n d / 4096) for an image of n latents of d channels, as RAE")
    condition_dropout: Fraction = Field(0.1, description="share of the samples with an image to draw that are trained without the user's words")
    reference_dropout: Fraction = Field(0.1, description="share of the edits trained without the images the user shows")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")

    def read_channels(self, features: int, latents: int) -> int:
        """Channels of what the connector reads, where the encoder's features have `features`, latents `latents`."""
        return features + latents * (self.understanding == "dim_concat")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise Unworkable(
                f"hidden = {self.hidden}",
                f"rotary embedding needs an even number of channels per head, and there are {self.heads} heads",
                f"use {_multiples(self.hidden, 2 * self.heads)}, or another number of heads",
            )
        if self.heads % self.kv_heads:
            raise Unworkable(
                f"kv_heads = {self.kv_heads}",
                f"every key-value head serves equally many of the {self.heads} query heads",
                f"use one of {_divisors(self.heads)}",
            )
        return self


class ParallelConfig(Section):
    """How the ranks share the model and the data."""

    nproc: PositiveInt = Field(1, description="processes started on this machine")
    tp: PositiveInt = Field(1, description="tensor parallelism: ranks that share each layer's matrices")
    pp: PositiveInt = Field(1, description="pipeline parallelism: ranks that hold different layers")
    ulysses: PositiveInt = Field(1, description="ranks that share the positions of a row; within attention they share its heads")
    sequence_parallel: bool = Field(True, description="with tp > 1: split the positions between the layers as well")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="what the replicas split: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights (DeepSpeed)")
    gather_once: bool = Field(False, description="ZeRO-3: gather the weights once a step, not once per use, and hold them in low precision meanwhile")
    schedule: Schedule = Field("1f1b", description="order of the micro-batches in the pipeline")
    pp_stages_per_rank: PositiveInt = Field(1, description="slices of layers per rank; more than 1 with schedule: interleaved")
    recompute: Recompute = Field("none", description="activations computed again in the backward pass: norms and SiLU (selective) or whole layers (full)")
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="where DeepSpeed keeps optimizer state and, in ZeRO-3, weights")
    nvme_path: str = Field("", description="folder for offload: nvme")
    threads: int = Field(0, ge=0, description="CPU threads per rank; 0 = cores / nproc")
    timeout_s: PositiveInt = Field(600, description="a collective that takes longer than this ends the run, seconds")
    stall_s: PositiveInt = Field(300, description="a rank without a finished step for so long has its stack logged and ends the run, seconds")


class DeepSpeedConfig(Section):
    """What DeepSpeed gets besides what follows from `parallel` and the stage."""

    extra: dict[str, Any] = Field(default_factory=dict, description="merged over the generated DeepSpeed configuration, key by key")


class KernelsConfig(Section):
    """Fused kernels: `on` insists on one, `off` leaves it, `auto` takes it where it is there and known to be faster."""

    fused_adam: Switch = Field("auto", description="AdamW of NVIDIA apex in the ZeRO engines (plain replicas update in one call anyway)")
    fused_norm: Switch = Field("auto", description="RMSNorm of NVIDIA apex")
    flex_attention: Switch = Field("auto", description="FlexAttention over the packed row with a block mask; `auto`: on GPUs")
    compile: Switch = Field("auto", description="torch.compile of norm, rotation and activation, forward and backward")


class Mixture(Section):
    """Sampling weights of the tasks of a prior stage; any positive numbers, normalised to shares of samples."""

    text: NonNegative = Field(0.0, description="captions alone")
    text_to_image: NonNegative = Field(0.0, description="draw the image of a caption")
    image_to_text: NonNegative = Field(0.0, description="describe an image")
    image_text_to_image: NonNegative = Field(0.0, description="draw after images and words: edits")
    interleaved: NonNegative = Field(0.0, description="documents and conversations of text and images in any order")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if sum(self.model_dump().values()) <= 0:
            raise Unworkable("all weights are 0", "there is nothing to draw from", "give at least one task a positive weight")
        return self


class JointConfig(Section):
    """A prior stage that goes on training the codec's compressor, which makes the latents, together with the backbone."""

    enabled: bool = Field(False, description="prior: train the compressor too, from the encoder's features")
    lambda_recon: NonNegative = Field(20.0, description="weight of the mean squared error of the features rebuilt from the latents, in variances of their channels")
    momentum: float = Field(0.01, gt=0, le=1, description="weight of a step in the running mean and variance by which the latents are normalised")
    collapse: Fraction = Field(0.1, description="the run ends when the latents' spread or effective rank falls below this share of what it was; 0 = never")


class QueryConfig(Section):
    """A prior stage that keeps the model as it is and trains queries of it, a connector and a flow decoder (Pathway II)."""

    enabled: bool = Field(False, description="prior: freeze the transformer; learnable queries ask it what a decoder of its own is to draw")
    queries: PositiveInt = Field(256, description="learnable vectors in the place of the image to be drawn")
    connector_layers: PositiveInt = Field(6, description="bidirectional layers, as wide as the transformer, between the queries and the decoder; MetaQuery 24, OpenUni 6")
    decoder_layers: PositiveInt = Field(12, description="layers of the flow decoder")
    decoder_width: int = Field(768, ge=4, multiple_of=4, description="width of the flow decoder")


class SpikeConfig(Section):
    """Steps whose loss or gradients are not finite, or far above what they were."""

    factor: NonNegative = Field(0.0, description="a step whose loss or gradient norm is above factor x its running median is recorded with its sample keys; 0 = none")
    window: PositiveInt = Field(100, description="steps of the running median; none is judged before there are so many")
    skip: int = Field(0, ge=0, description="steps in a row that are left out, and recorded, because their gradients are not finite; one more ends the run")


# The losses that a sample of a task is there for, by the weight of a prior stage.
LEARNED_BY: dict[str, tuple[str, ...]] = {
    "text": ("lambda_text",),
    "text_to_image": ("lambda_flow",),
    "image_to_text": ("lambda_text",),
    "image_text_to_image": ("lambda_flow",),
    "interleaved": ("lambda_text", "lambda_flow"),
}


class StageConfig(Section):
    """One step of the curriculum."""

    name: str = Field(description="unique; the run directory's subfolders are named after it", pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["codec", "latents", "prior"] = Field(description="what is trained, or `latents`: computed from the features by the codec")
    steps: int = Field(0, ge=0, description="optimizer steps; a latents stage has none")
    batch: PositiveInt = Field(32, description="codec: images per optimizer step over all ranks; prior: packed rows per step")
    micro_batches: PositiveInt = Field(1, description="pieces a rank cuts its share of the step into")
    row_positions: PositiveInt = Field(1024, description="prior: positions per packed row")
    mixture: Mixture = Mixture(text_to_image=1.0)
    mixture_changes: dict[PositiveInt, dict[Literal["text", "text_to_image", "image_to_text", "image_text_to_image", "interleaved"], NonNegative]] = Field(
        {}, description="prior: other weights after so many steps, {STEP: {TASK: WEIGHT}}; tasks not named get 0, every source goes on where it stands"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate after warm-up")
    min_lr_ratio: Fraction = Field(0.0, description="cosine: final learning rate over lr")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: NonNegative = Field(0.01, description="of AdamW, decoupled")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW: decay of the first and second moment")
    eps: float = Field(1e-6, gt=0, description="of AdamW")
    clip: NonNegative = Field(1.0, description="largest global gradient norm; 0 = no clipping")
    ema: Fraction = Field(0.999, description="decay of the weight average; 0 = none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forward and backward: auto = bfloat16 on GPUs and CPUs that multiply it fast; master weights and moments are float32"
    )
    lambda_text: NonNegative = Field(1.0, description="weight of the mean cross-entropy per text token")
    z_loss: NonNegative = Field(0.0, description="prior: weight of log^2 Z beside the cross-entropy, Z the normaliser of its softmax: keeps the logits from drifting")
    lambda_flow: NonNegative = Field(5.0, description="weight of the mean squared flow error per latent channel")
    trainable: Literal["all", "connector", "decoder"] = Field(
        "all", description="connector (prior): only the visual connector and heads; decoder (codec): not the compressor, which is that of the joint stage before"
    )
    joint: JointConfig = JointConfig()
    query: QueryConfig = QueryConfig()
    spike: SpikeConfig = SpikeConfig()
    log_every: PositiveInt = Field(10, description="steps between metric records")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses at fixed t; 0 = only at the end")
    sample_every: int = Field(0, ge=0, description="steps between picture grids; 0 = only at the end")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0 = only at the end")

    @property
    def tasks(self) -> list[str]:
        """The tasks that the mixture has at any time of the stage."""
        return [task for task in Mixture.model_fields if self.draws(task)]

    @model_validator(mode="after")
    def _learned(self) -> Self:
        if self.kind != "prior":
            return self
        for task in self.tasks:
            if not any(getattr(self, weight) for weight in LEARNED_BY[task]):
                raise Unworkable(
                    f"{task} in the mixture with " + " and ".join(f"{weight} = 0" for weight in LEARNED_BY[task]),
                    "these samples would be computed and nothing learned of them",
                    f"mixture.{task}: 0, or a weight above 0",
                )
        drawn = [task for task in self.tasks if "lambda_flow" in LEARNED_BY[task]]
        if self.joint.enabled and not drawn:
            raise Unworkable("joint.enabled = true without a task that draws", "the compressor is trained by the images that are drawn", "give mixture.text_to_image a weight, or joint.enabled: false")
        if self.trainable == "connector" and self.tasks == ["text"]:
            raise Unworkable("trainable = connector with text alone", "neither connector nor heads have a part in it", "give a task with images a weight, or trainable: all")
        return self

    def draws(self, task: str) -> bool:
        """Whether the task has a weight at any time of the stage."""
        later = [weight for weights in self.mixture_changes.values() for name, weight in weights.items() if name == task]
        return any([getattr(self.mixture, task), *later])

    def mixture_at(self, step: int) -> dict[str, float]:
        """Weight of every task in the step after `step` others."""
        begun = [after for after in self.mixture_changes if after <= step]
        weights = dict.fromkeys(Mixture.model_fields, 0.0)
        return weights | (self.mixture_changes[max(begun)] if begun else self.mixture.model_dump())

    @model_validator(mode="after")
    def _changes(self) -> Self:
        for after, weights in self.mixture_changes.items():
            if not sum(weights.values()):
                raise Unworkable(f"mixture_changes.{after} = {weights}", "there is nothing to draw from", "give at least one task a positive weight")
            if after >= self.steps:
                raise Unworkable(f"mixture_changes.{after} of a stage of steps = {self.steps}", "it would never come", f"change it after 1 to {self.steps - 1} steps")
        return self

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if (self.kind == "latents") != (self.steps == 0):
            need = "no optimizer steps" if self.kind == "latents" else "optimizer steps"
            raise Unworkable(
                f"steps = {self.steps}",
                f"a {self.kind} stage has {need}",
                "remove `steps`" if self.kind == "latents" else "set steps >= 1",
            )
        only = {"connector": "prior", "decoder": "codec"}.get(self.trainable, self.kind)
        if self.kind != only:
            raise Unworkable(f"trainable = {self.trainable}", f"a {self.kind} stage has no such part", f"use it with kind: {only}, or trainable: all")
        if self.joint.enabled and self.kind != "prior":
            raise Unworkable("joint.enabled = true", f"a {self.kind} stage has no backbone to train with", "use it with kind: prior")
        if self.query.enabled and (self.kind != "prior" or self.joint.enabled or self.trainable != "all"):
            other = f"kind = {self.kind}" if self.kind != "prior" else "joint.enabled = true" if self.joint.enabled else f"trainable = {self.trainable}"
            raise Unworkable(f"query.enabled = true with {other}", "it trains queries, connector and flow decoder beside a frozen transformer, nothing else", "use kind: prior, joint.enabled: false and trainable: all")
        if self.warmup > self.steps:
            raise Unworkable(
                f"warmup = {self.warmup}",
                f"the stage ends after steps = {self.steps}, before the learning rate is reached",
                f"use warmup <= {self.steps}",
            )
        return self


class SampleConfig(Section):
    """How pictures are drawn, during training and by `unicom sample`."""

    prompts: list[str] = Field(["red apple", "cat face", "blue heart", "rocket"], description="drawn in every picture grid")
    steps: PositiveInt = Field(25, description="solver steps of the prior")
    guidance: NonNegative = Field(3.0, description="v = v_uncond + guidance (v_cond - v_uncond)")
    decoder_steps: PositiveInt = Field(8, description="solver steps of the decoder; 1 = its one-step estimate of the picture")
    decoder_guidance: NonNegative = Field(1.0, description="v = v_blank + guidance (v - v_blank), v_blank for a black picture's latents; 1 = off. Needs codec.condition_dropout")
    image_guidance: NonNegative = Field(1.5, description="of edits: v = v_noimages + image_guidance (v - v_noimages), after `guidance`; 1 = off")
    guidance_interval: tuple[Fraction, Fraction] = Field((0.0, 1.0), description="times lo <= t < hi at which guidance acts; t = 0 is noise")
    renorm: Literal["none", "global", "channel"] = Field("none", description="guided velocities are not longer than unguided ones: of a picture, or of each of its latents")
    renorm_min: Fraction = Field(0.0, description="least factor of `renorm`")
    solver: Literal["euler", "heun", "dpm"] = Field("euler", description="of the flow ODE; `heun` evaluates twice a step, `dpm` is DPM-Solver++(2M)")
    seed: int = Field(0, description="of the noise of the first picture")


class EvalConfig(Section):
    """What `unicom eval` needs."""

    judge_path: str = Field("assets/resnet50", description="folder of the ResNet50 that judges generated pictures")
    lpips_path: str = Field("assets/lpips", description="folder of the LPIPS networks")
    images: PositiveInt = Field(64, description="held-out images reconstructed")
    prompts: PositiveInt = Field(64, description="training captions drawn and judged by nearest prototype")
    fixed_t: list[Fraction] = Field([0.1, 0.3, 0.5, 0.7, 0.9], description="times at which the flow loss is measured")
    raw_weights: bool = Field(False, description="held-out losses while training also of the weights as they are, beside the averaged ones")
    fid_path: str = Field("assets/fid-inception", description="suite reconstruction: folder of the Inception network of FID; empty = no rFID, no KID")
    fid_protocol: Literal["torch-fidelity", "clean-fid", "pytorch-fid"] = Field("torch-fidelity", description="whose resizing to 299 px and value range FID uses")


class AblationConfig(Section):
    """What `unicom ablate` varies; all else is the recipe's, the same for every training."""

    seeds: PositiveInt = Field(3, description="trainings per variant; their seeds count up from `seed`")
    kinds: list[Literal["attention", "mlp"]] = Field(["attention", "mlp"], min_length=1, description="kinds of compressor")
    widths: list[PositiveInt] = Field([64], min_length=1, description="latent channels d of the variants that keep all tokens; a quarter of the tokens gets 4 d, as many values")
    spatial: list[Literal["pool", "resampler"]] = Field(["pool"], description="how the other variants quarter the tokens")
    pictures: PositiveInt = Field(10, description="held-out pictures on the reconstruction sheet")


class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    mlflow: bool = Field(True, description="also send everything to MLflow, from a process of its own")
    mlflow_uri: str = Field("", description="tracking URI; empty = MLFLOW_TRACKING_URI, else sqlite in the run directory's parent")
    experiment: str = Field("unicom", description="MLflow experiment")

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        if "@" in urlsplit(self.mlflow_uri).netloc:
            raise Unworkable(
                "mlflow_uri with a user name or password",
                "a run's configuration is written to files, to MLflow and into the report",
                "leave them out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give the whole address as MLFLOW_TRACKING_URI",
            )
        return self


class Config(Section):
    """A recipe."""

    name: str = Field(description="of the run, shown in reports and MLflow")
    seed: int = Field(0, ge=0, description="of weights, sample order, noise and augmentation")
    run_dir: str = Field(description="everything the run writes")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept per stage")
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    features: FeaturesConfig = FeaturesConfig()
    codec: CodecConfig = CodecConfig()
    prior: PriorConfig = PriorConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    kernels: KernelsConfig = KernelsConfig()
    stages: list[StageConfig] = Field(default_factory=list)
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    ablation: AblationConfig = AblationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _stages(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise Unworkable(f"stages = {names}", "folders and overrides are named after stages", "give each stage its own name")
        for refusal in refusals(self.parallel, self.prior, self.parallel.nproc):
            raise Unworkable(refusal.what, refusal.why, refusal.remedy)
        for stage in self.stages:
            replicas = self.layout(stage, self.parallel.nproc).dp
            share = replicas * stage.micro_batches
            named = set(self.data.conversations.values())
            for task in ("image_text_to_image", "interleaved"):
                if stage.kind == "prior" and stage.draws(task) and task not in named:
                    weight = getattr(stage.mixture, task)
                    raise Unworkable(
                        f"stages.{stage.name}.mixture.{task} = {weight:g}" if weight else f"stages.{stage.name}.mixture_changes with {task}",
                        "no set of data.conversations is of that task, so there is nothing to draw",
                        f"data.conversations: {{SET: {task}}}, or {task}: 0",
                    )
            if stage.kind != "latents" and stage.batch % share:
                raise Unworkable(
                    f"stages.{stage.name}.batch = {stage.batch}",
                    f"it does not divide into dp x micro_batches = {replicas} x {stage.micro_batches} equal pieces",
                    f"use {_multiples(stage.batch, share)}",
                )
        return self

    @model_validator(mode="after")
    def _views(self) -> Self:
        buckets, crop = self.codec.decoder.buckets, self.encoder.crop
        if (buckets == "aspect") != (crop == "bucket"):
            raise Unworkable(
                f"codec.decoder.buckets = {buckets} with encoder.crop = {crop}",
                "the encoder has to see what the decoder draws, no more and no less of the picture",
                "codec.decoder.buckets: aspect with encoder.crop: bucket, or codec.decoder.buckets: square with encoder.crop: none",
            )
        return self

    @model_validator(mode="after")
    def _trained_encoder(self) -> Self:
        others = {
            "encoder.kind = random": self.encoder.kind == "random",
            f"codec.condition_dropout = {self.codec.condition_dropout}": self.codec.condition_dropout > 0,
            **{f"stages.{stage.name}.trainable = decoder": stage.trainable == "decoder" for stage in self.stages},
        }
        for other, found in others.items():
            if self.codec.encoder_trainable and found:
                raise Unworkable(f"codec.encoder_trainable = true with {other}", "this encoder or these features stay as they are", "use codec.encoder_trainable: false, or change the other")
        return self

    @model_validator(mode="after")
    def _perceptual(self) -> Self:
        if self.codec.perceptual == self.encoder.kind:
            raise Unworkable(
                f"codec.perceptual = {self.codec.perceptual} with encoder.kind = {self.encoder.kind}",
                "what the encoder does not see, a loss in its own features does not miss",
                "use another network, such as lpips-alex",
            )
        return self

    @model_validator(mode="after")
    def _understanding(self) -> Self:
        reading, spatial = self.prior.understanding, self.codec.compressor.spatial
        others = {
            f"codec.compressor.spatial = {spatial}": (spatial != "none", "features and latents stand side by side, and these latents are fewer"),
            **{f"stages.{s.name}.joint.enabled = true": (s.joint.enabled, "the latents that are read would be those of the compressor before") for s in self.stages},
        }
        for other, (found, why) in others.items():
            if reading != "raw" and found:
                raise Unworkable(f"prior.understanding = {reading} with {other}", why, "prior.understanding: raw, or change the other")
        return self

    @model_validator(mode="after")
    def _joint(self) -> Self:
        joint = ""  # the last joint stage so far
        compressor = self.codec.compressor
        for stage in self.stages:
            if stage.joint.enabled and compressor.kind == "identity":
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.compressor.kind = identity",
                    "an identity has nothing to train",
                    "codec.compressor.kind: attention or mlp, or joint.enabled: false",
                )
            if stage.joint.enabled and self.codec.latent_scale == "shared":
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.latent_scale = shared",
                    "the latents of a joint stage are normalised by running deviations, channel by channel",
                    "codec.latent_scale: channel, or joint.enabled: false",
                )
            if stage.joint.enabled and (compressor.spatial != "none" or compressor.bottleneck == "kl"):
                key = "spatial" if compressor.spatial != "none" else "bottleneck"
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.compressor.{key} = {getattr(compressor, key)}",
                    "joint training rebuilds the features of every token from its latent, without sampling",
                    f"codec.compressor.{key}: none, or joint.enabled: false",
                )
            if stage.kind == "prior" and joint and not stage.joint.enabled:
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = false after the joint stage {joint}",
                    "it would read latents of the compressor as it was before",
                    f"enable it here too, or put {stage.name} before {joint}",
                )
            if stage.trainable == "decoder" and not joint:
                raise Unworkable(
                    f"stages.{stage.name}.trainable = decoder",
                    "the compressor is taken from a joint stage, and there is none before",
                    "put it after a prior stage with joint.enabled: true, or use trainable: all",
                )
            joint = stage.name if stage.joint.enabled else joint
        return self

    @model_validator(mode="after")
    def _query(self) -> Self:
        p, begun = self.parallel, ""  # the last query stage so far
        split = {key: getattr(p, key) for key in ("tp", "pp", "ulysses") if getattr(p, key) > 1}
        for stage in self.stages:
            if stage.query.enabled and split:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = true with " + ", ".join(f"parallel.{key} = {size}" for key, size in split.items()),
                    "queries, connector and flow decoder are small and trained data-parallel only",
                    "parallel: {tp: 1, pp: 1, ulysses: 1} with a zero_stage of 0 to 3",
                )
            before = [other for other in self.stages[: self.stages.index(stage)] if other.kind == "prior"]
            if stage.query.enabled and not before and not self.prior.init_from:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = true in the first prior stage, without prior.init_from",
                    "the transformer that the queries ask would stay as it was drawn at random",
                    f"put a prior stage before {stage.name}, or name published weights in prior.init_from",
                )
            if stage.kind == "prior" and begun and not stage.query.enabled:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = false after the query stage {begun}",
                    "it would move the transformer that the queries of that stage ask",
                    f"enable it here too, or put {stage.name} before {begun}",
                )
            begun = stage.name if stage.query.enabled else begun
        return self

    def codec_before(self, stage: StageConfig) -> str:
        """Name of the last codec stage before `stage`; "" when there is none."""
        names = [other.name for other in self.stages[: self.stages.index(stage)] if other.kind == "codec"]
        return names[-1] if names else ""

    def layout(self, stage: StageConfig, world: int) -> Layout:
        """How `world` ranks share a stage: as `parallel` says for a prior; a codec is small and only data-parallel."""
        layout = Layout.of(self.parallel, world)
        return layout if stage.kind == "prior" else layout.data_parallel()

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`; KeyError if there is none."""
        return {stage.name: stage for stage in self.stages}[name]
