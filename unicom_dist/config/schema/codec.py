"""Compressor, diffusion decoder and the loss that trains them."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unicom_dist.config.schema.base import Fraction, NonNegative, Section, Unworkable, multiples


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
                f"use {multiples(self.image_px, unit)}, or another patch_px",
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
