"""`unicom sample`: pictures for prompts, captions for images, reconstructions beside originals."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unicom_dist.config.schema import Config, SampleConfig
    from unicom_dist.sample.pipeline import UniComPipeline

DOCS = "docs/getting-started.md"
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A run directory or a saved model folder.")]


def sample(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Describe this image; may be repeated.")] = None,
    reconstruct: Annotated[
        str, typer.Option(help="Encode and decode the images below a folder, in its tars, or of the set `heldout`.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures [default: CKPT/pictures].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture.", show_default="the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.", show_default="the recipe's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 = none.", show_default="the recipe's")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most images reconstructed.", show_default="all of a folder, else 8")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images reconstructed at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors that reconstruct a folder; 1 = no Ray.")] = 1,
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
) -> None:
    """Draw the prompts, describe images, reconstruct images; with neither given, what the run's recipe names."""
    config = _recipe(checkpoint)
    everything = not (prompts or image or reconstruct)
    if everything and config is None:
        raise ConfigError(
            "nothing to do",
            "no prompt, --image or --reconstruct was given, and a model folder has no recipe to take them from",
            f'write for example `unicom sample {checkpoint} "red apple"`',
            DOCS,
        )
    settings = _settings(config, seed, steps, guidance)
    folder = out or Path(checkpoint) / "pictures"
    given = [_open(path) for path in image or []]
    if reconstruct and (reconstruct != "heldout" or config is None):
        with logged():
            _reconstruct_folder(checkpoint, reconstruct, out, settings, batch, workers, limit or 0)
        if not (prompts or image):
            return
    from unicom_dist.sample.pipeline import UniComPipeline

    with logged():
        pipeline = UniComPipeline.from_pretrained(checkpoint, stage=stage, batch=batch)
        if everything and config is not None:
            _draw(pipeline, config.sample.prompts, count, settings, folder)
            _reconstruct(pipeline, *_held_out(config, limit or 8), settings, folder)
            _describe(pipeline, *_held_out(config, 4))
            return
        if prompts:
            _draw(pipeline, prompts, count, settings, folder)
        if reconstruct == "heldout" and config is not None:
            _reconstruct(pipeline, *_held_out(config, limit or 8), settings, folder)
        if given:
            _describe(pipeline, given, [str(path) for path in image or []])


def _recipe(checkpoint: str) -> "Config | None":
    """The recipe of a run directory; None for a model folder."""
    from unicom_dist.config.load import load_recipe

    return load_recipe(checkpoint).config if (Path(checkpoint) / "config.yaml").is_file() else None


def _settings(config: "Config | None", seed: int | None, steps: int | None, guidance: float | None) -> "SampleConfig":
    from unicom_dist.config.schema import SampleConfig

    given = {"seed": seed, "steps": steps, "guidance": guidance}
    base = config.sample if config is not None else SampleConfig()
    return base.model_copy(update={key: value for key, value in given.items() if value is not None})


def _draw(
    pipeline: "UniComPipeline", prompts: Sequence[str], count: int, settings: "SampleConfig", folder: Path
) -> None:
    from PIL.PngImagePlugin import PngInfo

    from unicom_dist.sample.grid import picture_grid

    wanted = [(prompt, settings.seed + number) for prompt in prompts for number in range(count)]
    pictures = pipeline(
        [prompt for prompt, _ in wanted],
        seeds=[seed for _, seed in wanted],
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        decoder_steps=settings.decoder_steps,
        decoder_guidance=settings.decoder_guidance,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for number, ((prompt, seed), picture) in enumerate(zip(wanted, pictures, strict=True)):
        facts = PngInfo()
        facts.add_itxt("prompt", prompt)
        facts.add_text("seed", str(seed))
        path = folder / f"{number:03d}-{_slug(prompt)}.png"
        picture.save(path, pnginfo=facts)
        say(f"{prompt} (seed {seed}): {path}")
    if len(pictures) > 1:
        labels = [prompt if count == 1 else f"{prompt} ({seed})" for prompt, seed in wanted]
        picture_grid(pictures, labels).save(folder / "grid.png")
        say(f"all of them: {folder / 'grid.png'}")


def _reconstruct_folder(
    checkpoint: str, source: str, out: Path | None, settings: "SampleConfig", batch: int, workers: int, limit: int
) -> None:
    from pipelines import reconstruct as job

    folder = out or Path(checkpoint) / "pictures" / (Path(source).resolve().name.removesuffix(".tar") or "all")
    chosen = job.Settings(settings.seed, settings.decoder_steps, settings.solver, settings.decoder_guidance)
    job.run(checkpoint, source, folder, chosen, batch, workers, limit)


def _reconstruct(
    pipeline: "UniComPipeline",
    originals: "Sequence[Image]",
    labels: Sequence[str],
    settings: "SampleConfig",
    folder: Path,
) -> None:
    from unicom_dist.sample.grid import picture_grid

    rebuilt = pipeline.reconstruct(
        originals,
        seeds=settings.seed,
        decoder_steps=settings.decoder_steps,
        solver=settings.solver,
        guidance=settings.decoder_guidance,
    )
    pairs = [picture for both in zip(originals, rebuilt, strict=True) for picture in both]
    texts = [text for label in labels for text in (label, "reconstructed")]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reconstructions.png"
    picture_grid(pairs, texts, columns=8 if len(labels) > 3 else 2).save(path)
    say(f"{len(labels)} reconstructions beside their originals: {path}")


def _describe(pipeline: "UniComPipeline", images: "Sequence[Image]", names: Sequence[str]) -> None:
    for name, caption in zip(names, pipeline.captions(images), strict=True):
        say(f"{name}: described as {caption!r}")


def _held_out(config: "Config", count: int) -> "tuple[list[Image], list[str]]":
    from unicom_dist.data import overview

    return overview.preview(config.data.path, "heldout", count)


def _open(path: Path) -> "Image":
    from unicom_dist.data.decode import decode_image

    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read", error.strerror or str(error), "name a readable image", DOCS) from None


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
