"""What is done with what was trained: drawing, evaluation, ablation, tracking."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, model_validator

from unicom_dist.config.schema.base import Fraction, NonNegative, Section, Unworkable


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
    pathways: list[Literal["transfusion", "query_guided"]] = Field(["transfusion", "query_guided"], min_length=1, description="`unicom ablate pathway`: who draws the latents of every width; with all channels, Transfusion alone")
    pictures: PositiveInt = Field(10, description="held-out pictures on the sheet")


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
