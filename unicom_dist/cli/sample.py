"""`unicom sample`: pictures for prompts, captions for images, reconstructions beside originals."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.storage import check_writable, reason

if TYPE_CHECKING:
    from PIL.Image import Image

    from unicom_dist.config.schema import Config, SampleConfig
    from unicom_dist.sample.pipeline import UniComPipeline

DOCS = "docs/getting-started.md"
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A run directory or a saved model folder.")]


def sample(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Describe or edit this image; may be repeated.")] = None,
    edit: Annotated[str, typer.Option(help="What to draw about the --image, or about several together.")] = "",
    reconstruct: Annotated[
        str, typer.Option(help="Encode and decode the images below a folder, in its tars, or of the set `heldout`.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures [default: CKPT/pictures].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture.", show_default="the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.", show_default="the recipe's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 = none.", show_default="the recipe's")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(min=0, help="Of edits, away from drawing without the images; 1 = none.")
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LO HI", help="Times between which guidance acts.")
    ] = None,
    renorm: Annotated[str | None, typer.Option(help="Of guided velocities: none, global, channel.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or dpm.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt, of seeds that count up.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most images reconstructed.", show_default="all of a folder, else 8")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images reconstructed at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors that reconstruct a folder; 1 = no Ray.")] = 1,
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
    skip_done: Annotated[
        bool, typer.Option("--skip-done", help="Keep pictures that are of these weights, settings and prompts already.")
    ] = False,
) -> None:
    """Draw prompts, describe, edit and reconstruct images. With none of these given, what the run's recipe names."""
    config = recipe_of(checkpoint)
    everything = not (prompts or image or reconstruct)
    if everything and config is None and (Path(checkpoint) / "model_index.json").is_file():
        raise ConfigError(
            "nothing to do",
            "no prompt, --image or --reconstruct was given, and a model folder has no recipe to take them from",
            f'write for example `unicom sample {checkpoint} "red apple"`',
            DOCS,
        )
    settings = settings_of(
        checkpoint,
        seed=seed,
        steps=steps,
        guidance=guidance,
        image_guidance=image_guidance,
        guidance_interval=guidance_interval,
        renorm=renorm,
        solver=solver,
    )
    if edit and not image:
        raise ConfigError("nothing to edit", "--edit is about one --image or several", "add --image PATH", DOCS)
    if skip_done and (image or reconstruct):
        raise ConfigError(
            "--skip-done with --image or --reconstruct",
            "it compares weights, settings and prompts, not pictures; a folder's reconstructions continue without it",
            "use it with prompts, or with those of the run's recipe",
            DOCS,
        )
    folder = out or Path(checkpoint) / "pictures"
    if everything or prompts or edit or reconstruct:
        check_writable(folder)
    given = [open_picture(path) for path in image or []]
    if reconstruct and (reconstruct != "heldout" or config is None):
        with logged():
            _reconstruct_folder(checkpoint, reconstruct, out, settings, batch, workers, limit or 0)
        if not (prompts or image):
            return
    from unicom_dist.sample.drawn import RECORD, identity_of, is_drawn, note_drawn

    identity = ""
    if skip_done:
        data = config.data.model_dump(mode="json") if everything and config is not None else None
        asked = {"prompts": prompts, "count": count, "limit": limit, "data": data}
        identity = identity_of(checkpoint, stage, settings, asked)
        if is_drawn(folder, identity):
            say(f"{folder} is of these weights, settings and prompts, skipped")
            return
    if (folder / RECORD).is_file():
        (folder / RECORD).unlink()  # no longer true from here on
    from unicom_dist.sample.pipeline import UniComPipeline

    with logged():
        pipeline = UniComPipeline.from_pretrained(checkpoint, stage=stage, batch=batch)
        if everything and config is not None:
            _draw(pipeline, config.sample.prompts, count, settings, folder)
            _reconstruct(pipeline, *_held_out(config, limit or 8), settings, folder)
            _describe(pipeline, *_held_out(config, 4))
        if prompts:
            _draw(pipeline, prompts, count, settings, folder)
        if reconstruct == "heldout" and config is not None:
            _reconstruct(pipeline, *_held_out(config, limit or 8), settings, folder)
        if edit:
            _edit(pipeline, edit, given, count, settings, folder)
        elif given:
            _describe(pipeline, given, [str(path) for path in image or []])
    if identity:
        note_drawn(folder, identity)


def recipe_of(checkpoint: str) -> "Config | None":
    """The recipe of a run directory; None for a model folder."""
    from unicom_dist.config.load import load_recipe

    return load_recipe(checkpoint).config if (Path(checkpoint) / "config.yaml").is_file() else None


def settings_of(checkpoint: str, **given: Any) -> "SampleConfig":
    """The `sample` section of a run's recipe, or what a model folder says, with what was given. ConfigError."""
    from pydantic import ValidationError

    from unicom_dist.config.schema import SampleConfig

    config = recipe_of(checkpoint)
    if config is not None:
        base = config.sample
    else:
        from unicom_dist.sample.model_folder import sampling_of

        base = sampling_of(Path(checkpoint))
    chosen = {key: value for key, value in given.items() if value is not None}
    try:
        return SampleConfig.model_validate({**base.model_dump(), **chosen})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        raise ConfigError(f"--{name}: {first['msg']}", "", "`unicom sample --help` says what it takes", DOCS) from None


def _draw(
    pipeline: "UniComPipeline", prompts: Sequence[str], count: int, settings: "SampleConfig", folder: Path
) -> None:
    from unicom_dist.sample.drawing import Drawing
    from unicom_dist.sample.grid import picture_grid

    wanted = [(prompt, settings.seed + number) for prompt in prompts for number in range(count)]
    asked = [pipeline.asking(prompt) for prompt, _ in wanted]
    pictures = pipeline.draw(asked, [seed for _, seed in wanted], Drawing.of(settings))
    folder.mkdir(parents=True, exist_ok=True)
    for number, ((prompt, seed), picture) in enumerate(zip(wanted, pictures, strict=True)):
        _save(picture, folder / f"{number:03d}-{_slug(prompt)}.png", prompt, seed)
    if len(pictures) > 1:
        labels = [prompt if count == 1 else f"{prompt} ({seed})" for prompt, seed in wanted]
        _write(picture_grid(pictures, labels), folder / "grid.png")
        say(f"all of them: {folder / 'grid.png'}")


def _edit(
    pipeline: "UniComPipeline",
    instruction: str,
    images: "Sequence[Image]",
    count: int,
    settings: "SampleConfig",
    folder: Path,
) -> None:
    from unicom_dist.sample.drawing import Drawing
    from unicom_dist.sample.grid import picture_grid

    seeds = [settings.seed + number for number in range(count)]
    pictures = pipeline.draw([pipeline.asking(instruction, images)] * count, seeds, Drawing.of(settings))
    folder.mkdir(parents=True, exist_ok=True)
    for number, (seed, picture) in enumerate(zip(seeds, pictures, strict=True)):
        _save(picture, folder / f"edit-{number:03d}-{_slug(instruction)}.png", instruction, seed)
    labels = [*["given"] * len(images), *(f"{instruction} ({seed})" for seed in seeds)]
    _write(picture_grid([*images, *pictures], labels), folder / "edit.png")
    say(f"beside what was given: {folder / 'edit.png'}")


def _save(picture: "Image", path: Path, prompt: str, seed: int) -> None:
    _write(picture, path, prompt=prompt, seed=seed)
    say(f"{prompt} (seed {seed}): {path}")


def _write(picture: "Image", path: Path, **facts: object) -> None:
    """Under its name a picture is whole, whenever the command is stopped."""
    from unicom_dist.data.encode import png_bytes
    from unicom_dist.data.tar import replace_file

    replace_file(path, png_bytes(picture, facts))


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
    _write(picture_grid(pairs, texts, columns=8 if len(labels) > 3 else 2), path)
    say(f"{len(labels)} reconstructions beside their originals: {path}")


def _describe(pipeline: "UniComPipeline", images: "Sequence[Image]", names: Sequence[str]) -> None:
    for name, caption in zip(names, pipeline.captions(images), strict=True):
        say(f"{name}: described as {caption!r}")


def _held_out(config: "Config", count: int) -> "tuple[list[Image], list[str]]":
    from unicom_dist.data import overview

    return overview.preview(config.data.path, "heldout", count)


def open_picture(path: Path) -> "Image":
    """The picture in a file. DataError."""
    from unicom_dist.data.decode import decode_image

    try:
        return decode_image(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read", reason(error), "name a readable image", DOCS) from None


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
