"""`unicom convert`: runs and checkpoints into model and Qwen2.5 folders, other layouts, and published weights back in.

One process, half a minute; most of it is importing transformers.
"""

import ctypes
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from unicom_dist.checkpoint.huggingface import write_qwen
from unicom_dist.checkpoint.reshard import reshard
from unicom_dist.checkpoint.saved import Checkpoint, latest
from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.checkpoint.weights import read_weights
from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.layout import Layout
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import Config, PriorConfig
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.segments import Segment
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel.engine import Fragment, Piece
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.sample.export import export
from unicom_dist.sample.loading import find_parts, load_prior
from unicom_dist.sample.model_folder import problems_of, sampling_of
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.sample.solver import time_grid
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_prior, write_tiny_weights

STAGE = "sft"
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


def write_checkpoint(config: Config, kinds: dict[str, dict[str, torch.Tensor]], model: dict) -> Path:
    """A checkpoint of STAGE as one rank writes it: {kind: tensors by name}."""
    names = list(kinds["weight"])
    fragments, start = [], 0
    for name in names:
        tensor = kinds["weight"][name]
        fragments.append(Fragment(Piece(name, tuple(tensor.shape)), 0, tensor.numel(), 0, start))
        start += tensor.numel()
    state = {kind: [torch.cat([tensors[name].flatten() for name in names])] for kind, tensors in kinds.items()}
    folder = Path(config.run_dir) / "checkpoints" / STAGE
    with CheckpointStore(folder, Mesh(0, 1, torch.device("cpu"))) as store:
        store.save(3, state, fragments, {"model": model, "loader": {}}, replicated=True)
        store.wait()
    return latest(folder)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dict[str, dict[str, torch.Tensor]]]:
    """A finished run, a checkpoint of its last stage and what is in that."""
    folder = tmp_path_factory.mktemp("convert")
    write_tiny_assets(folder)
    config = tiny_config(folder)
    write_tiny_weights(config)
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    vocabulary.save(Path(config.run_dir) / "vocabulary.json")
    kinds = {kind: tensors_of(tiny_prior(config, vocabulary, seed=7 + n)) for n, kind in enumerate(KINDS)}
    content = json.loads((Path(config.run_dir) / "weights" / STAGE / "config.json").read_text())
    return config, write_checkpoint(config, kinds, content), kinds


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_checkpoint_becomes_a_model_folder(run, tmp_path, weights):
    config, checkpoint, kinds = run
    assert unicom(["convert", "export", str(checkpoint), str(tmp_path / "model"), "--weights", weights]) == 0
    prior = load_prior(find_parts(tmp_path / "model").prior)
    assert prior.content["step"] == 3
    expected = kinds["weight" if weights == "raw" else "ema"]
    for name, parameter in prior.model.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16().float()), name
    assert len(UniComPipeline.from_pretrained(tmp_path / "model")("a red circle", 1, 1, decoder_steps=1)) == 1
    if weights == "raw":  # of a run: its last stage's newest checkpoint
        assert unicom(["convert", "export", config.run_dir, str(tmp_path / "run"), "--weights", "raw"]) == 0
        (one, first), (other, second) = (read_weights(tmp_path / name / "prior") for name in ("model", "run"))
        assert one == other
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_becomes_the_folder_that_its_pipeline_saves(run, tmp_path):
    config, _, _ = run
    assert unicom(["convert", "export", config.run_dir, str(tmp_path / "a")]) == 0
    UniComPipeline.from_pretrained(config.run_dir).save_pretrained(tmp_path / "b")
    assert (
        unicom(["convert", "export", str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    )  # a model folder is a source, too
    for other in ("b", "c"):
        files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(tmp_path / other) for p in (tmp_path / other).rglob("*") if p.is_file())
        for part in ("codec", "prior"):
            (one, a), (two, b) = (read_weights(tmp_path / name / part) for name in ("a", other))
            assert one == two
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_float32_folders_draw_the_same_to_the_bit(run, tmp_path):
    _, checkpoint, _ = run
    for name, source in (("a", checkpoint), ("b", tmp_path / "a")):
        assert unicom(["convert", "export", str(source), str(tmp_path / name), "--dtype", "float32"]) == 0
    UniComPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c", torch.float32)
    drawn = []
    for name in ("a", "b", "c"):
        pipeline = UniComPipeline.from_pretrained(tmp_path / name)
        latents = pipeline.draw_latents(["a red circle"], 1, 2)[0].values
        drawn.append((latents, pipeline("a red circle", 1, 2, decoder_steps=2)[0].tobytes()))
        assert unicom(["convert", "check", str(tmp_path / name)]) == 0
    assert all(torch.equal(latents, drawn[0][0]) and pixels == drawn[0][1] for latents, pixels in drawn)


def test_a_model_folder_says_what_it_is(run, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import GenerationConfig

    config, checkpoint, _ = run
    folder = tmp_path / "model"
    assert unicom(["convert", "export", str(checkpoint), str(folder)]) == 0
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "UniComPipeline"
    for library, name in (index["codec"], index["prior"]):
        assert hasattr(importlib.import_module(library), name)
    prior = load_prior(folder / "prior")
    stats = json.loads((folder / "latent_stats.json").read_text())
    assert (stats["mean"], stats["std"]) == (prior.content["stats"]["mean"], prior.content["stats"]["std"])
    for part, section in (("prior", config.prior), ("decoder", config.codec)):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / f"scheduler_{part}")
        scheduler.set_timesteps(sigmas=[1 - step / 5 for step in range(5)])
        times = torch.tensor(time_grid(5, section.timestep_shift))
        torch.testing.assert_close(1 - scheduler.sigmas, times, atol=1e-6, rtol=0)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == prior.vocabulary.control["<|im_end|>"]
    assert sampling_of(folder) == config.sample
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parts"]["prior"]["step"] == 3
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}


def test_a_model_folder_that_was_changed_is_refused(run, tmp_path):
    _, checkpoint, _ = run
    folder = tmp_path / "model"
    assert unicom(["convert", "export", str(checkpoint), str(folder)]) == 0
    weights = folder / "prior" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    assert problems_of(folder) == ["prior/model.safetensors has another content"]
    assert unicom(["convert", "check", str(folder)]) == CheckpointError.exit_code
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="not as it was exported") as caught:
        find_parts(folder)
    assert caught.value.why == f"prior/model.safetensors has {len(whole) - 1} bytes instead of {len(whole)}"
    weights.write_bytes(whole)
    stats = folder / "latent_stats.json"
    content = stats.read_text()
    number = next(place for place, letter in enumerate(content) if letter.isdigit())
    stats.write_text(content[:number] + str((int(content[number]) + 1) % 10) + content[number + 1 :])
    with pytest.raises(CheckpointError, match="not as it was exported") as caught:
        find_parts(folder)
    assert "mean is not the prior's" in caught.value.why


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        return model(ids[None]).logits[0]


def test_transformers_loads_the_backbone_and_gives_the_same_logits(run, tmp_path):
    from transformers import AutoTokenizer

    config, checkpoint, _ = run
    out = tmp_path / "qwen"
    assert unicom(["convert", "export", str(checkpoint), str(out), "--format", "qwen", "--weights", "raw"]) == 0
    export(checkpoint, tmp_path / "model", weights="raw")
    prior = load_prior(find_parts(tmp_path / "model").prior)
    text = "a red circle beside a blue square"
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(text).input_ids)
    assert ids.tolist() == prior.vocabulary.encode(text)
    with torch.no_grad():
        ours = prior.model.backbone(ids, torch.arange(len(ids)), [Segment(0, "causal", len(ids))])
    torch.testing.assert_close(transformers_logits(out, ids), ours, atol=1e-5, rtol=1e-5)
    again = unicom(["convert", "import", str(out), str(tmp_path / "new.yaml"), "--base", "tiny"])
    assert again == 0
    section = load_recipe(tmp_path / "new.yaml").config.prior
    assert (section.init_from, section.tokenizer) == (str(out), str(out))
    assert (section.hidden, section.layers, section.rope_theta) == (config.prior.hidden, 2, config.prior.rope_theta)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_large_backbone_is_spread_over_files_with_an_index(tmp_path, tied):
    shape = PriorConfig(hidden=16, layers=2, heads=4, kv_heads=2, ffn=24, tie_embeddings=tied)
    model = Qwen2(shape, 50, seed=3)
    tensors = {f"backbone.{name}": p.detach() for name, p in model.named_parameters()}
    write_qwen(tmp_path, shape, tensors, {"eos_token_id": 1}, torch.float32, file_bytes=6000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    ids = torch.arange(9)
    with torch.no_grad():
        ours = model(ids, ids, [Segment(0, "causal", 9)])
    torch.testing.assert_close(transformers_logits(tmp_path, ids), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", ["tp=2,pp=2,dp=2", "tp=4", "dp=3", "pp=2,ulysses=2"])
def test_a_resharded_checkpoint_is_the_same_model_in_other_files(run, tmp_path, sizes):
    _, checkpoint, kinds = run
    out = tmp_path / "step-000003"
    assert unicom(["convert", "reshard", str(checkpoint), str(out), "--layout", sizes]) == 0
    saved = Checkpoint(out)
    asked = dict(item.split("=") for item in sizes.split(","))
    assert all(saved.state["layout"][axis] == int(size) for axis, size in asked.items())
    assert saved.state["loader"] == {}
    world = math.prod(int(size) for size in asked.values())
    written = [path.stat().st_size for path in sorted(out.glob("rank-*.safetensors"))]
    assert len(written) == world
    if sizes == "dp=3":  # with tp and pp the ranks differ by what is held whole and by the embedding
        assert max(written) < 1.5 * sum(written) / world
    for kind in KINDS:
        tensors = saved.tensors(kind)
        assert tensors.keys() == kinds[kind].keys()
        assert all(torch.equal(tensor, kinds[kind][name]) for name, tensor in tensors.items())


def reset_peak() -> int:
    """Resident bytes now, without what was freed and kept; the peak counts from here."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pytest.skip("this system does not let a process reset its peak memory")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def test_memory_of_conversion_is_that_of_the_largest_tensor(tmp_path):
    write_tiny_assets(tmp_path)
    config = tiny_config(tmp_path, prior={"hidden": 256, "ffn": 1024, "layers": 44, "heads": 4, "kv_heads": 2})
    write_tiny_weights(config)
    rows, content = 16384, json.loads((Path(config.run_dir) / "weights" / STAGE / "config.json").read_text())
    Vocabulary.full(config.prior.tokenizer, rows).save(Path(config.run_dir) / "vocabulary.json")
    weights = tensors_of(Transfusion(config.prior, rows, content["latent_channels"], content["feature_channels"]))
    largest, total = (f(t.nbytes for t in weights.values()) for f in (max, sum))
    checkpoint = write_checkpoint(config, dict.fromkeys(KINDS, weights), content)
    assert largest == 16 << 20  # much more than what a process takes and keeps by itself
    assert total > 10 * largest
    del weights
    for convert in (
        lambda: reshard(checkpoint, tmp_path / "step-000001", Layout(tp=2, pp=2)),
        lambda: export(checkpoint, tmp_path / "model"),
        lambda: export(checkpoint, tmp_path / "qwen", form="qwen"),
    ):
        convert()  # once for what is imported and allocated on the way
        for path in (tmp_path / name for name in ("step-000001", "model", "qwen")):
            if path.exists():
                path.rename(tmp_path / f"{path.name}-{len(list(tmp_path.iterdir()))}")
        before = reset_peak()
        convert()
        assert status_bytes("VmHWM") - before < 2.5 * largest  # one tensor, its bfloat16 copy, what the writer gathers


def damage(path: Path) -> None:
    file = next(path.glob("rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "it has no COMPLETE file"),
        (lambda path: (path / "state.json").write_text('{"format": 1}'), "format 1, this version reads 2"),
        (damage, "its header describes"),
    ],
    ids=["incomplete", "foreign", "damaged"],
)
def test_what_is_not_a_whole_checkpoint_is_refused_with_the_reason(run, tmp_path, capsys, change, what):
    config, checkpoint, _ = run
    other = Path(config.run_dir) / "checkpoints" / "copy" / "step-000003"
    other.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    change(other)
    for arguments in (["export"], ["reshard", "--layout", "tp=2"]):
        command = ["convert", arguments[0], str(other), str(tmp_path / "out"), *arguments[1:]]
        assert unicom(command) == 5
        shown = capsys.readouterr().err
        assert what in shown
        assert shown.count("\n") >= 4
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
    for file in other.iterdir():
        file.unlink()
    other.rmdir()


@pytest.mark.parametrize(
    ("layout", "what"), [("tp=3", "heads"), ("qp=2", "qp"), ("tp", "tp"), ("pp=5", "layer"), ("tp=0", "tp=0")]
)
def test_an_impossible_layout_is_refused(run, tmp_path, capsys, layout, what):
    _, checkpoint, _ = run
    assert unicom(["convert", "reshard", str(checkpoint), str(tmp_path / "out"), "--layout", layout]) == 2
    assert what in capsys.readouterr().err


def test_nothing_is_overwritten_and_published_weights_must_be_whole(run, tmp_path, capsys):
    _, checkpoint, _ = run
    assert unicom(["convert", "export", str(checkpoint), str(tmp_path)]) == 2
    out = tmp_path / "qwen"
    assert unicom(["convert", "export", str(checkpoint), str(out), "--format", "qwen"]) == 0
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))
    capsys.readouterr()
    assert unicom(["convert", "import", str(out), str(tmp_path / "new.yaml")]) == 5
    assert "model.layers.2" in capsys.readouterr().err
    assert not (tmp_path / "new.yaml").exists()
