"""Who holds what: parts, shards and shares of Transfusion are complete and overlap nowhere. One process, seconds.

The ranks of a layout are played one after the other on a process group that communicates with nobody.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models import init
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.init import fill
from unicom_dist.models.published import published_source
from unicom_dist.models.sharding import build_transfusion, declarations, outline
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel.engine import Piece, pieces_of
from unicom_dist.parallel.megatron import import_megatron
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.tensor import materialise
from unicom_dist.testing.tiny_batch import tiny_batch

VOCABULARY, LATENT, FEATURE = 50, 6, 10
SIZES = (VOCABULARY, LATENT, FEATURE)
CONFIG = PriorConfig(hidden=32, layers=4, heads=8, kv_heads=2, ffn=48, max_grid=8, tie_embeddings=False)
TIED = CONFIG.model_copy(update={"tie_embeddings": True})
PARTS = {
    1: [WHOLE],
    2: [Part(True, False, (range(1), range(2, 3))), Part(False, True, (range(1, 2), range(3, 4)))],
    3: [Part(True, False, (range(1),)), Part(False, False, (range(1, 3),)), Part(False, True, (range(3, 4),))],
}


@contextmanager
def played(rank: int, layout: Layout) -> Iterator[Mesh]:
    """The mesh of one rank; nobody else is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        yield init_mesh(layout)
    finally:
        dist.destroy_process_group()


def each_rank(layout: Layout, fn: Callable[[Mesh], None]) -> None:
    for rank in range(layout.world):
        with played(rank, layout) as mesh:
            fn(mesh)


def pieces(module: torch.nn.Module) -> list[Piece]:
    return [piece for name, p in module.named_parameters() for piece in pieces_of(name, p, tuple(p.shape))]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_parts_are_the_model_under_its_own_names(count: int, config: PriorConfig) -> None:
    whole = dict(Transfusion(config, *SIZES, seed=5).named_parameters())
    held = Counter()
    for part in PARTS[count]:
        module = build_transfusion(config, *SIZES, 5, Mesh(0, 1, torch.device("cpu")), part)
        for name, parameter in module.named_parameters():
            (piece,) = pieces_of(name, parameter, tuple(parameter.shape))
            assert torch.equal(parameter, whole[piece.name]), name
            held[piece.name] += piece.owner
    assert held == Counter(whole.keys())


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "pp"), [(2, False, 1), (4, True, 1), (8, True, 1), (2, True, 3), (4, False, 2)]
)
def test_owned_pieces_tile_every_tensor(config: PriorConfig, tp: int, sequence_parallel: bool, pp: int) -> None:
    whole = {name: torch.zeros(p.shape) for name, p in Transfusion(config, *SIZES).named_parameters()}

    def count(mesh: Mesh) -> None:
        for piece in pieces(outline(config, *SIZES, mesh, PARTS[pp][mesh.pp.rank])):
            assert piece.shape == whole[piece.name].shape
            if piece.owner:
                piece.of(whole[piece.name]).add_(1)

    each_rank(Layout(tp=tp, pp=pp, sequence_parallel=sequence_parallel), count)
    assert [name for name, times in whole.items() if not (times == 1).all()] == []


def test_an_outline_of_72b_weighs_nothing_and_its_cuts_are_even() -> None:
    large = PriorConfig(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=29568, tie_embeddings=False)
    layout = Layout(tp=8, pp=4, sequence_parallel=True)
    with played(5, layout) as mesh:
        module = outline(large, 152064, 64, 1152, mesh, Part(True, False, (range(20),)))
    held = sum(p.numel() for p in module.parameters())
    assert all(p.is_meta for p in module.parameters())
    layer = 8192 * (8192 * 2 + 2 * 1024) + 3 * 8192 * 29568
    towers = 2 * 8192 * 8192 + (1152 + 256 + 64) * 8192
    assert held == pytest.approx((20 * layer + 152064 * 8192) / 8 + towers, rel=1e-3)


def test_every_declaration_names_something() -> None:
    names = [name for name, _ in Transfusion(CONFIG.model_copy(update={"qk_norm": True}), *SIZES).named_modules()]
    joint = {"compressor", "reconstruct"}  # of JointPrior
    unused = {d.pattern for d in declarations(CONFIG)} - joint
    assert [pattern for pattern in unused if not any(fnmatchcase(name, pattern) for name in names)] == []


def test_one_whole_tensor_at_a_time_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], init.draw

    def watched(*args: object) -> torch.Tensor:
        assert not [name for name, storage in drawn if storage() is not None]
        values = draw(*args)
        drawn.append((args[0], weakref.ref(values)))
        return values

    monkeypatch.setattr(init, "draw", watched)
    with played(1, Layout(tp=2, sequence_parallel=True)) as mesh:
        build_transfusion(CONFIG, *SIZES, 0, mesh)
    assert len(drawn) > 30


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_regions_and_slices_share_out_a_batch(sequence_parallel: bool) -> None:
    samples = [
        [("text", 5), ("latent", 4), ("text", 6)],
        [("feature", 6), ("text", 4)],
        [("text", 2), ("latent", 8), ("text", 3), ("feature", 2), ("text", 2), ("latent", 5)],
    ]
    batch = tiny_batch(samples, *SIZES)  # 47 positions
    layout = Layout(tp=2, ulysses=4, sequence_parallel=sequence_parallel)
    got: dict[str, list[torch.Tensor]] = {}

    def cut(mesh: Mesh) -> None:
        share = outline(CONFIG, *SIZES, mesh).share
        region = share.region(batch)
        assert region.num_positions == 12
        mine = share.slice_of(region)
        assert mine.num_positions == share.rows(batch) == (6 if sequence_parallel else 12)
        if mesh.tp.rank == 0 or sequence_parallel:
            begin = mesh.ulysses.rank * 12 + (mesh.tp.rank * 6 if sequence_parallel else 0)
            for name in ("token", "label", "latent", "feature"):
                got.setdefault(name, []).append(getattr(mine, f"{name}_index") + begin)
            got.setdefault("label ids", []).append(mine.label_ids)
            got.setdefault("latents", []).append(mine.latents)

    each_rank(layout, cut)
    for name in ("token", "label", "latent", "feature"):
        assert torch.equal(torch.cat(got[name]), getattr(batch, f"{name}_index")), name
    assert torch.equal(torch.cat(got["label ids"]), batch.label_ids)
    assert torch.equal(torch.cat(got["latents"]), batch.latents)


@pytest.mark.parametrize(
    "rows", [range(VOCABULARY), [(7 * row) % 60 for row in range(VOCABULARY)]], ids=["all", "some"]
)
def test_a_rank_reads_its_cuts_of_published_weights(tmp_path: Path, rows: list[int]) -> None:
    published = Transfusion(TIED, 60, LATENT, FEATURE, seed=9).backbone
    save_file({n: p.detach() for n, p in published.named_parameters()}, tmp_path / "model.safetensors")
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    more = {"intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | shape | more))
    source = published_source(TIED.model_copy(update={"init_from": str(tmp_path)}), rows)
    whole = {f"backbone.{name}": p.detach() for name, p in published.named_parameters()}
    whole["backbone.model.embed_tokens.weight"] = whole["backbone.model.embed_tokens.weight"][list(rows)]
    for rank in range(4):
        with played(rank, Layout(tp=4)) as mesh:
            backbone = outline(TIED, *SIZES, mesh).backbone
        materialise(backbone)
        fill(backbone, source, "backbone.")
        for name, parameter in backbone.named_parameters():
            cuts = [piece.of(whole[piece.name]).flatten() for piece in parameter.pieces]
            assert torch.equal(parameter.flatten()[: sum(map(len, cuts))], torch.cat(cuts)), (rank, name)


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    import_megatron.cache_clear()
    monkeypatch.delattr(parallel_state, "_set_global_memory_buffer")
    with pytest.raises(PreflightError, match="_set_global_memory_buffer"):
        import_megatron()
    monkeypatch.undo()
    assert import_megatron().ColumnParallelLinear
