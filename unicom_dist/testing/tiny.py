"""The `tiny` recipe inside a temporary folder, and the pictures and tokenizer it needs, made on the spot.

`write_tiny_assets` draws circles, squares and triangles with captions ("a red circle") and trains a byte-level BPE of a
few hundred tokens with Qwen2.5's special tokens. Both are the same on every call.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import Config

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle")
SIDE = 32  # pixels

# In the order of their ids in Qwen2.5.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TinyAssets:
    """Folders that the tiny configuration names."""

    pictures: Path
    tokenizer: Path


def tiny_config(tmp_path: Path, **overrides: Any) -> Config:
    """The tiny recipe with every path below `tmp_path`; keyword arguments replace keys, mappings merge.

    `tiny_config(tmp_path, parallel={"nproc": 2}, stages={"codec": {"steps": 8}})`; stages are addressed by name, and a
    list of stages replaces them all. ConfigError as for a recipe.
    """
    paths = {
        "run_dir": str(tmp_path / "runs" / "tiny"),
        "data": {"source": str(tmp_path / "pictures"), "path": str(tmp_path / "data")},
        "codec": {"perceptual_path": str(tmp_path / "assets" / "lpips")},
        "prior": {"tokenizer": str(tmp_path / "assets" / "tiny-tokenizer")},
        "eval": {"judge_path": str(tmp_path / "assets" / "resnet50"), "lpips_path": str(tmp_path / "assets" / "lpips")},
    }
    return load_recipe("recipes/tiny.yaml", [*_assignments(paths), *_assignments(overrides)]).config


def write_tiny_assets(tmp_path: Path, pictures: int = 24) -> TinyAssets:
    """Write `pictures/` and `assets/tiny-tokenizer/` below `tmp_path`, where `tiny_config(tmp_path)` looks for them."""
    folder = tmp_path / "pictures"
    captions = write_pictures(folder, pictures)
    tokenizer = tmp_path / "assets" / "tiny-tokenizer"
    write_tokenizer(tokenizer, captions)
    return TinyAssets(folder, tokenizer)


def write_pictures(folder: Path, count: int) -> list[str]:
    """`count` PNGs of 32 x 32 pixels with a `.txt` caption beside each; returns the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        shape = SHAPES[number // len(COLOURS) % len(SHAPES)]
        variant = number // (len(COLOURS) * len(SHAPES))
        captions.append(f"a {colour} {shape}")
        draw_shape(shape, COLOURS[colour], variant).save(folder / f"{shape}-{colour}-{variant:03d}.png")
        (folder / f"{shape}-{colour}-{variant:03d}.txt").write_text(captions[-1] + "\n", encoding="utf-8")
    return captions


def draw_shape(shape: str, colour: tuple[int, int, int], variant: int = 0) -> Image.Image:
    """A 32 x 32 RGB picture of one shape on white; variants differ in place and size."""
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    radius = 9 + variant % 4
    x, y = SIDE // 2 + variant * 3 % 7 - 3, SIDE // 2 + variant * 5 % 7 - 3
    box = (x - radius, y - radius, x + radius, y + radius)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    return image


def write_tokenizer(folder: Path, captions: list[str]) -> None:
    """A byte-level BPE with Qwen2.5's pre-tokenizer and special tokens, as `tokenizer.json` and its settings."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 48, initial_alphabet=alphabet, show_progress=False)
    roles = ["system", "user", "assistant", "Describe the image.", "Draw this:"]
    tokenizer.train_from_iterator([*captions, *roles], trainer)
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(specials)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 131072,
        "add_prefix_space": False,
        "split_special_tokens": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _assignments(values: Mapping[str, Any]) -> list[str]:
    """Top-level keys as `key=<JSON>`; JSON is YAML, and a mapping given to a section is merged into it."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
