"""Loaders: one order for any number of ranks and pieces, exact resume, malformed samples. 1 process, 10 s."""

import io
import itertools
import json
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import CodecConfig, Config, StageConfig
from unicom_dist.data.loader import (
    CodecLoader,
    PriorLoader,
    build_vocabulary,
    heldout_codec_batches,
    heldout_prior_batches,
)
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import write_npy
from unicom_dist.data.order import Order, generator_of
from unicom_dist.data.pairs import open_set
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import ShardWriter
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.codec import CodecBatch, LatentStats
from unicom_dist.models.compressor import Compressor
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.models.share import Share
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.awkward import awkward_pictures, near
from unicom_dist.testing.shards import FINGERPRINT, write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

STATS = LatentStats(torch.arange(4) / 10, 1 + torch.arange(4) / 10)
MIXED = {"mixture": {"text": 1, "text_to_image": 2, "image_to_text": 1}, "row_positions": 96}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("loader")
    config = tiny_config(folder, data={"augmented_views": 1}, codec={"latent_noise_tau": 0.5})
    write_tiny_assets(folder)
    write_tiny_sets(config, 23, grids=[(2, 2), (1, 3), (2, 3)])
    return config


@pytest.fixture(scope="module")
def vocabulary(config: Config) -> Vocabulary:
    return build_vocabulary(config)


def stage(config: Config, which: str = "pretrain", **changes: Any) -> StageConfig:
    return StageConfig.model_validate({**config.stage(which).model_dump(), **changes})


def prior(config: Config, vocabulary: Vocabulary, rank: int = 0, ranks: int = 1, **changes: Any) -> PriorLoader:
    return PriorLoader(config, stage(config, **{**MIXED, **changes}), vocabulary, STATS, rank, ranks)


def same(one: Any, other: Any) -> bool:
    """Bit-equal batches, or lists of them."""
    if isinstance(one, list) and not all(isinstance(item, str) for item in one):
        return len(one) == len(other) and all(itertools.starmap(same, zip(one, other, strict=True)))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, PackedBatch | CodecBatch):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)


def prior_content(batches: list[PackedBatch]) -> list[tuple[Any, ...]]:
    """What must not depend on how the step was cut of each sample of a step, sorted."""
    out = []
    for batch in batches:
        for n, (key, task) in enumerate(zip(batch.keys, batch.tasks, strict=True)):
            mine = batch.latent_sample == n
            arrays = (batch.latents[mine], batch.noise[mine], batch.t[mine], batch.label_ids[batch.label_sample == n])
            out.append((key, task, *(array.numpy().tobytes() for array in arrays)))
    return sorted(out)


def codec_content(batches: list[CodecBatch]) -> list[tuple[Any, ...]]:
    names = ("images", "noise", "t", "latent_noise_level")
    out = []
    for batch in batches:
        for n, key in enumerate(batch.keys):
            real = batch.mask[n]
            padded = (batch.features[n][real], batch.grid[n][real], batch.latent_noise[n][real])
            arrays = [getattr(batch, name)[n] for name in names]
            out.append((key, *(array.numpy().tobytes() for array in (*arrays, *padded))))
    return out


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_prior_steps_do_not_depend_on_ranks_and_pieces(
    config: Config, vocabulary: Vocabulary, ranks: int, pieces: int
) -> None:
    whole = prior(config, vocabulary, batch=4)
    cut = [prior(config, vocabulary, r, ranks, batch=4, micro_batches=pieces) for r in range(ranks)]
    for _ in range(6):
        parts = [loader.next_step() for loader in cut]
        assert all(len(part) == pieces for part in parts)
        assert prior_content([batch for part in parts for batch in part]) == prior_content(whole.next_step())
        assert all(loader.state_dict() == whole.state_dict() for loader in cut)
    for loader in (whole, *cut):
        loader.close()


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 4), (2, 2), (4, 1)])
def test_codec_steps_do_not_depend_on_ranks_and_pieces(config: Config, ranks: int, pieces: int) -> None:
    whole = CodecLoader(config, stage(config, "codec", batch=8))
    cut = [CodecLoader(config, stage(config, "codec", batch=8, micro_batches=pieces), r, ranks) for r in range(ranks)]
    for _ in range(8):
        parts = [batch for loader in cut for batch in loader.next_step()]
        assert codec_content(parts) == codec_content(whole.next_step())
    for loader in (whole, *cut):
        loader.close()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_the_order_goes_on_when_the_number_of_ranks_changes(
    config: Config, vocabulary: Vocabulary, before: int, after: int
) -> None:
    with prior(config, vocabulary, batch=8) as whole:
        first = [prior(config, vocabulary, r, before, batch=8) for r in range(before)]
        for _ in range(5):
            whole.next_step()
            for loader in first:
                loader.next_step()
        state = json.loads(json.dumps(first[0].state_dict()))
        then = [prior(config, vocabulary, r, after, batch=8) for r in range(after)]
        for loader in then:
            loader.load_state_dict(state)
        for _ in range(4):
            parts = [batch for loader in then for batch in loader.next_step()]
            assert prior_content(parts) == prior_content(whole.next_step())
        for loader in (*first, *then):
            loader.close()


@given(taken=st.integers(0, 30))
@settings(max_examples=12, deadline=None)
def test_resuming_after_any_step_gives_the_same_stream(config: Config, vocabulary: Vocabulary, taken: int) -> None:
    makers = (lambda: prior(config, vocabulary), lambda: CodecLoader(config, config.stage("codec")))
    for make in makers:
        with make() as first, make() as second:
            for _ in range(taken):
                first.next_step()
            state = json.loads(json.dumps(first.state_dict()))
            expected = [first.next_step() for _ in range(4)]
            second.next_step()  # a loader that has already run ahead can be set back, too
            second.load_state_dict(state)
            assert second.state_dict() == state
            assert all(same(second.next_step(), step) for step in expected)


def test_closing_does_not_lose_prepared_steps(config: Config, vocabulary: Vocabulary) -> None:
    with prior(config, vocabulary) as steady, prior(config, vocabulary) as interrupted:
        for _ in range(4):
            assert same(steady.next_step(), interrupted.next_step())
            interrupted.close()


def test_attention_is_prepared_with_the_batch(config: Config, vocabulary: Vocabulary) -> None:
    """In the loader's thread, for what the batch holds."""
    where = []

    def plan(segments: list[Segment]) -> AttentionPlan:
        where.append((threading.current_thread().name, segments))
        return AttentionPlan.build(segments, torch.float32)

    with PriorLoader(config, stage(config, **MIXED), vocabulary, STATS, plan=plan) as loader:
        batches = loader.next_step()
    assert where[: len(batches)] == [("data", batch.segments) for batch in batches]
    share = Share(Mesh(0, 1, torch.device("cpu")))
    assert all(batch.plan is share.attend(batch, torch.float32) for batch in batches)


def test_resuming_costs_the_same_whatever_was_consumed(config: Config, vocabulary: Vocabulary) -> None:
    with prior(config, vocabulary) as loader:
        loader.next_step()
        state = loader.state_dict()
        far = json.loads(json.dumps(state))
        shift = 10**12
        far["counts"] = {task: n + shift * (2 if task == "text_to_image" else 1) for task, n in far["counts"].items()}
        far["drawn"] = {task: n + shift for task, n in far["drawn"].items()}
        far["open_rows"] = [[[task, n + shift] for task, n in row] for row in far["open_rows"]]
        start = time.process_time()
        loader.load_state_dict(far)
        assert time.process_time() - start < 0.5  # replaying 10^12 samples would take years
        assert loader.next_step()
        assert len(json.dumps(loader.state_dict())) < 8 * len(json.dumps(state))


def test_an_epoch_visits_every_sample_once(config: Config) -> None:
    with CodecLoader(config, stage(config, "codec", batch=2)) as loader:
        keys = [key for _ in range(46) for batch in loader.next_step() for key in batch.keys]
    assert len(set(keys[:46])) == 46  # 23 images and one more view of each
    assert sorted(keys[46:]) == sorted(keys[:46])
    assert keys[46:] != keys[:46]


@given(st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_order_is_a_permutation_of_every_size(size: int, epoch: int) -> None:
    order = Order(size, "seed")
    drawn = [order[epoch * size + n] for n in range(size)]
    assert sorted(number for number, _ in drawn) == list(range(size))
    assert {visit for _, visit in drawn} == {epoch}


def test_an_order_is_well_mixed() -> None:
    mixed, other = Order(5000, 1), Order(5000, 2)
    order = np.array([mixed[n][0] for n in range(5000)], dtype=float)
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert not np.array_equal(order, [other[n][0] for n in range(5000)])


def test_noise_follows_key_and_visit(config: Config) -> None:
    with CodecLoader(config, stage(config, "codec", batch=2)) as loader:
        seen: dict[str, list[Tensor]] = {}
        for _ in range(46):
            for batch in loader.next_step():
                for key, noise in zip(batch.keys, batch.noise, strict=True):
                    seen.setdefault(key, []).append(noise)
    assert all(len(visits) == 2 and not torch.equal(*visits) for visits in seen.values())
    firsts = torch.stack([visits[0] for visits in seen.values()])
    assert abs(float(firsts.mean())) < 0.02
    assert abs(float(firsts.std()) - 1) < 0.02


def test_the_noise_of_latents_has_their_layout_and_is_drawn_where_somebody_reads_it(config: Config) -> None:
    """2 x 2, 1 x 3 and 2 x 3 tokens are 1, 2 and 2 cells. A posterior is sampled in training, not when held out."""

    def batches(codec: CodecConfig) -> list[CodecBatch]:
        changed = config.model_copy(update={"codec": codec})
        with CodecLoader(changed, stage(config, "codec", batch=4, micro_batches=1)) as loader:
            return [batch for _ in range(3) for batch in loader.next_step()]

    codec = config.codec.model_copy(update={"latent_noise_tau": 0.0})
    quiet = batches(codec)
    for keys in ({"spatial": "pool"}, {"spatial": "pool", "bottleneck": "kl"}, {"bottleneck": "kl"}):
        compressor = codec.compressor.model_copy(update=keys)
        network = Compressor(compressor, 24)
        changed = codec.model_copy(update={"compressor": compressor})
        for batch, plain in zip(batches(changed), quiet, strict=True):
            _, mask = network.layout(batch.grid, batch.mask)
            assert batch.latent_noise.shape == (*mask.shape, 4)
            assert batch.latent_noise[mask].any(1).all() == ("bottleneck" in keys)
            assert not batch.latent_noise[~mask].any()
            assert not batch.latent_noise_level.any()
            assert torch.equal(batch.noise, plain.noise)
            assert batch.keys == plain.keys
        heldout = next(heldout_codec_batches(config.model_copy(update={"codec": changed}), 0.5, 4))
        assert not heldout.latent_noise.any()


def test_a_posteriors_noise_follows_key_and_visit(config: Config) -> None:
    compressor = config.codec.compressor.model_copy(update={"bottleneck": "kl"})
    changed = config.model_copy(update={"codec": config.codec.model_copy(update={"compressor": compressor})})
    by_ranks = []
    for ranks in (1, 2):
        loaders = [CodecLoader(changed, stage(config, "codec", batch=4), rank, ranks) for rank in range(ranks)]
        by_ranks.append(
            [codec_content([batch for loader in loaders for batch in loader.next_step()]) for _ in range(3)]
        )
        for loader in loaders:
            loader.close()
    assert by_ranks[0] == by_ranks[1]


def test_latents_are_normalised_by_the_stats(config: Config, vocabulary: Vocabulary) -> None:
    pairs = ShardSet(Path(config.data.path) / "train", {"latent": Path(config.run_dir) / "latents" / "train"})
    stored = {pairs.key(n): np.load(io.BytesIO(pairs[n].parts["latent"]["latent.npy"])) for n in range(len(pairs))}
    with prior(config, vocabulary, micro_batches=1) as loader:
        (batch,) = loader.next_step()
    for number, key in enumerate(batch.keys):
        if batch.tasks[number] == "text_to_image":
            raw = batch.latents[batch.latent_sample == number] * STATS.std + STATS.mean
            assert torch.allclose(raw, torch.from_numpy(stored[key]).float(), atol=1e-5)


def test_a_joint_stage_has_features_in_place_of_latents_and_the_same_noise(
    config: Config, vocabulary: Vocabulary
) -> None:
    kind = config.encoder.kind
    pairs = ShardSet(Path(config.data.path) / "train", {kind: Path(config.data.path) / "train"})
    stored = {pairs.key(n): np.load(io.BytesIO(pairs[n].parts[kind]["features.npy"])) for n in range(len(pairs))}
    with (
        prior(config, vocabulary, micro_batches=1, joint={"enabled": True}) as joint,
        prior(config, vocabulary, micro_batches=1) as plain,
    ):
        for _ in range(3):
            (batch,), (other,) = joint.next_step(), plain.next_step()
            assert other.target_features.shape[0] == 0
            assert batch.latents.isnan().all()
            assert batch.latents.shape == other.latents.shape
            differing = ("latents", "target_features")
            same_in_both = [f.name for f in fields(batch) if f.name not in differing]
            assert all(same(getattr(batch, name), getattr(other, name)) for name in same_in_both)
            for number, key in enumerate(batch.keys):
                mine = batch.target_features[batch.latent_sample == number]
                if batch.tasks[number] == "text_to_image":
                    assert torch.equal(mine, torch.from_numpy(stored[key]))


def test_the_mixture_is_exact_over_samples(config: Config, vocabulary: Vocabulary) -> None:
    with prior(config, vocabulary, batch=16) as loader:
        for _ in range(5):
            loader.next_step()
        state, report = loader.state_dict(), loader.report()
    counts, pairs = state["counts"], len(open_set(config, "train"))
    drawn = {task: report[f"data/epochs/{task}"] * pairs for task in counts}
    assert all(counts[task] <= drawn[task] <= 2 * counts[task] for task in counts), "two steps are prepared"
    total = sum(counts.values())
    assert abs(counts["text_to_image"] - total / 2) < 1
    assert abs(counts["text"] - total / 4) < 1
    assert 0 <= loader.report()["data/pad_fraction"] < 0.1


CHANGES = {"steps": 10, "mixture_changes": {3: {"image_to_text": 1.0}, 5: {"text": 3.0, "text_to_image": 1.0}}}


def test_a_stage_changes_its_mixture_at_a_step_and_goes_on_in_its_sources(
    config: Config, vocabulary: Vocabulary
) -> None:
    """Samples drawn before may still leave in the rows after; the draws themselves change with the step."""
    with prior(config, vocabulary, batch=8, **CHANGES) as loader, prior(config, vocabulary, batch=8) as steady:
        states = []
        for step in range(7):
            assert same(loader.next_step(), steady.next_step()) == (step < 3)
            states.append(loader.state_dict())
    assert set(states[2]["counts"]) == {"text", "text_to_image", "image_to_text"}
    assert set(states[3]["counts"]) == {"image_to_text"}
    assert states[4]["drawn"]["text"] == states[2]["drawn"]["text"]
    drawn = {task: n - states[4]["drawn"][task] for task, n in states[6]["drawn"].items()}
    assert drawn["image_to_text"] == 0
    assert drawn["text"] + drawn["text_to_image"] == sum(states[6]["counts"].values())
    assert abs(drawn["text"] - 3 * drawn["text_to_image"]) <= 3


@pytest.mark.parametrize("taken", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("prefetch", [1, 2, 8])
def test_resuming_across_a_change_of_the_mixture_gives_the_same_stream(
    config: Config, vocabulary: Vocabulary, taken: int, prefetch: int
) -> None:
    """However far the loader's thread has run ahead."""
    changing = stage(config, **{**MIXED, **CHANGES})

    def loader(prefetch: int) -> PriorLoader:
        return PriorLoader(config, changing, vocabulary, STATS, prefetch=prefetch)

    with loader(prefetch) as first, loader(2) as second:
        for _ in range(taken):
            first.next_step()
        state = json.loads(json.dumps(first.state_dict()))
        expected = [first.next_step() for _ in range(4)]
        second.load_state_dict(state)
        assert all(same(second.next_step(), step) for step in expected)


def test_a_task_without_a_sample_is_an_error(config: Config, vocabulary: Vocabulary) -> None:
    Manifest(fingerprint="none").write(Path(config.data.path) / "talks")
    data = config.data.model_copy(update={"sets": {"talks": "interleaved"}})
    changed = config.model_copy(update={"data": data})
    with pytest.raises(DataError, match=r"draws interleaved, whose sets hold no sample\n.*\n.*weight 0"):
        prior(changed, vocabulary, mixture={"text": 1, "interleaved": 1})


def test_captions_are_dropped_at_the_configured_rate(config: Config, vocabulary: Vocabulary) -> None:
    empty = len(vocabulary.encode("user")) + len(vocabulary.encode("assistant")) + 7
    only = {"mixture": {"text_to_image": 1.0}, "batch": 64}
    with prior(config, vocabulary, **only) as loader:
        first = [s.length for b in loader.next_step() for s in b.segments if s.mode == "causal" and s.length > 1]
    assert 0.02 < sum(length == empty for length in first) / len(first) < 0.25


def test_held_out_batches_are_the_same_every_time(config: Config, vocabulary: Vocabulary) -> None:
    one = [*heldout_prior_batches(config, vocabulary, STATS, 0.3, 4), *heldout_codec_batches(config, 0.3, 3)]
    two = [*heldout_prior_batches(config, vocabulary, STATS, 0.3, 4), *heldout_codec_batches(config, 0.3, 3)]
    assert same(one, two)
    assert one[0].t.eq(torch.tensor(0.3)).all()
    assert one[0].keys == [key for n in range(4) for key in [f"heldout-{n:04d}"] * 2]
    assert one[1].keys == [f"heldout-{n:04d}" for n in range(3)]
    assert not one[1].latent_noise_level.any()
    later = next(iter(heldout_prior_batches(config, vocabulary, STATS, 0.9, 4)))
    assert torch.equal(later.noise, one[0].noise)


def test_a_stage_has_its_own_order(config: Config, vocabulary: Vocabulary) -> None:
    other = stage(config, **{**MIXED, "name": "other"})
    with prior(config, vocabulary) as one, PriorLoader(config, other, vocabulary, STATS) as two:
        assert one.next_step()[0].keys != two.next_step()[0].keys
        with pytest.raises(DataError, match="stage = 'pretrain', this run has 'other'"):
            two.load_state_dict(one.state_dict())


SIZES = [(32, 32), (64, 20), (30, 32), (20, 64), (64, 20), (33, 32)]
GRIDS = [(2, 2), (1, 3), (2, 2), (3, 1), (1, 3), (2, 2)]


@pytest.fixture(scope="module")
def aspect(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """57 pictures in three shapes."""
    folder = tmp_path_factory.mktemp("aspect")
    buckets = {"decoder": {"buckets": "aspect"}, "latent_noise_tau": 0.5}
    config = tiny_config(folder, codec=buckets, encoder={"crop": "bucket"})
    write_tiny_sets(config, 57, heldout=12, grids=GRIDS, sizes=SIZES)
    return config


def shape_of(key: str) -> tuple[int, ...]:
    return {(64, 20): (8, 28), (20, 64): (28, 8)}.get(SIZES[int(key[-4:]) % len(SIZES)], (16, 16))


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 1), (2, 1), (2, 2), (8, 1), (4, 4)])
def test_bucketed_steps_do_not_depend_on_ranks_and_pieces(aspect: Config, ranks: int, pieces: int) -> None:
    whole = CodecLoader(aspect, stage(aspect, "codec", batch=16))
    cut = [CodecLoader(aspect, stage(aspect, "codec", batch=16, micro_batches=pieces), r, ranks) for r in range(ranks)]
    shapes = set()
    for _ in range(12):
        parts = [loader.next_step() for loader in cut]
        assert len({len(part) for part in parts}) == 1
        assert len(parts[0]) == max(pieces, 16 // ranks // 8)
        batches = [batch for part in parts for batch in part]
        for batch in batches:
            assert {shape_of(key) for key in batch.keys} == {tuple(batch.images.shape[-2:])}
            assert batch.noise.shape == batch.images.shape
            shapes.add(tuple(batch.images.shape[-2:]))
        assert codec_content(batches) == codec_content(whole.next_step())
        assert all(loader.state_dict() == whole.state_dict() for loader in cut)
    assert len(shapes) == 3
    for loader in (whole, *cut):
        loader.close()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (8, 2)])
def test_a_bucketed_order_goes_on_to_the_bit_with_other_ranks(aspect: Config, before: int, after: int) -> None:
    one = stage(aspect, "codec", batch=16)
    with CodecLoader(aspect, one) as whole:
        first = [CodecLoader(aspect, one, r, before) for r in range(before)]
        for _ in range(5):
            whole.next_step()
            for loader in first:
                loader.next_step()
        state = json.loads(json.dumps(first[0].state_dict()))
        assert sum(len(places) for places in state["waiting"].values()) > 0
        then = [CodecLoader(aspect, one, r, after) for r in range(after)]
        for loader in then:
            loader.load_state_dict(state)
        for _ in range(6):
            parts = [batch for loader in then for batch in loader.next_step()]
            assert codec_content(parts) == codec_content(whole.next_step())
        for loader in (*first, *then):
            loader.close()


def test_bucketed_epochs_lose_and_repeat_nothing(aspect: Config) -> None:
    with CodecLoader(aspect, stage(aspect, "codec", batch=16)) as loader:
        keys = [key for _ in range(30) for batch in loader.next_step() for key in batch.keys]
    visits = {key: keys.count(key) for key in keys}
    assert len(visits) == 57
    mean = len(keys) / 57
    assert all(mean - 2 < n < mean + 2 for n in visits.values())  # at most one visit waits


def test_a_position_in_other_buckets_is_refused(aspect: Config) -> None:
    with CodecLoader(aspect, aspect.stage("codec")) as loader:
        state = loader.state_dict()
        with pytest.raises(DataError, match="buckets"):
            loader.load_state_dict({**state, "buckets": "other"})


def test_held_out_pictures_come_bucket_by_bucket(aspect: Config) -> None:
    batches = list(heldout_codec_batches(aspect, 0.3, 12))
    assert sorted(key for batch in batches for key in batch.keys) == [f"heldout-{n:04d}" for n in range(12)]
    assert [len(batch.keys) for batch in batches] == [2, 6, 4]
    for batch in batches:
        assert {shape_of(key) for key in batch.keys} == {tuple(batch.images.shape[-2:])}


def test_square_batches_are_what_they_were(config: Config) -> None:
    pairs = ShardSet(Path(config.data.path) / "train")
    square = tiny_config(Path(config.data.path).parent)
    order = Order(23, square.seed, "codec")
    with CodecLoader(square, stage(square, "codec", batch=4)) as loader:
        (batch,) = loader.next_step()
        state = loader.state_dict()
    assert state == {"stage": "codec", "seed": 0, "samples": 23, "batch": 4, "step": 1}
    for row in range(4):
        number, visit = order[row]
        assert batch.keys[row] == pairs.key(number)
        picture = Image.open(io.BytesIO(bytes(pairs[number].parts[""]["webp"]))).convert("RGB")
        pixels = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS), np.float32) * np.float32(1 / 127.5) - 1
        assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
        generator = generator_of(square.seed, "codec", batch.keys[row], visit)
        assert torch.equal(batch.t[row], torch.rand(1, generator=generator)[0])
        assert torch.equal(batch.noise[row], torch.randn(3, 16, 16, generator=generator))
    assert batch.blank is None


def test_a_batch_that_does_not_divide_is_refused(config: Config) -> None:
    with pytest.raises(DataError, match="does not divide among 3 ranks"):
        CodecLoader(config, stage(config, "codec", batch=4), 0, 3)


def test_features_of_another_encoder_are_refused(config: Config, vocabulary: Vocabulary) -> None:
    kind = config.encoder.kind
    CodecLoader(config, config.stage("codec"), expect_fingerprint={kind: FINGERPRINT})
    with pytest.raises(DataError, match=f"fingerprint {FINGERPRINT}, the configuration's is other"):
        CodecLoader(config, config.stage("codec"), expect_fingerprint={kind: "other"})
    with pytest.raises(DataError, match="'latent' part was made by something else"):
        PriorLoader(config, config.stage("pretrain"), vocabulary, STATS, expect_fingerprint={"latent": "other"})


def damage(config: Config, part: str, key: str, members: dict[str, bytes]) -> None:
    """Rewrite the shard of `train` that holds `key` with other members for it; an empty dict leaves the sample out."""
    base = Path(config.data.path) / "train"
    folder = Path(config.run_dir) / "latents" / "train" if part == "latent" else base
    pairs, manifest = ShardSet(base, {part: folder} if part else {}), Manifest.read(folder, part)
    for shard, entry in enumerate(Manifest.read(base).shards):
        name = part_name(entry.name, part)
        rows = range(len(pairs))[shard * 10 : shard * 10 + entry.samples]
        samples = {pairs.key(n): {e: bytes(m) for e, m in pairs[n].parts[part].items()} for n in rows}
        if key not in samples:
            continue
        with ShardWriter(folder / name) as writer:
            for other, content in samples.items():
                changed = {**content, **members} if other == key else content
                if other != key or members:
                    writer.write(other, changed)
        manifest.shards[shard] = writer.entry
        manifest.write(folder)
        return
    raise KeyError(key)


BAD = [
    ("", {"webp": b"not an image"}, "image cannot be read", "codec"),
    ("", {"json": b'{"caption": "  "}'}, "no caption", "prior"),
    ("", {"json": b"{"}, "json member cannot be read", "prior"),
    ("random", {"features.npy": b"\x93NUMPY"}, "array cannot be read", "both"),
    ("random", {"json": b'{"grid": [9, 9]}'}, "has shape", "both"),
    ("random", {}, "has no 'random' part", "both"),
    ("random", {"features.npy": write_npy(np.zeros((3, 12), np.float16))}, "has shape [3, 12]", "both"),
    ("random", {"features.npy": write_npy(np.zeros((4, 5), np.float16))}, "has shape [4, 5]", "both"),
    ("random", {"features.npy": write_npy(np.zeros((0, 12), np.float16))}, "has shape [0, 12]", "both"),
    ("random", {"json": b'{"grid": [0, 0]}'}, "has no grid", "both"),
    ("random", {"features.npy": write_npy(np.full((4, 12), np.nan, np.float16))}, "not finite", "codec alone"),
    ("random", {"features.npy": write_npy(np.full((4, 12), np.inf, np.float16))}, "not finite", "codec alone"),
    ("latent", {"json": b"{}"}, "has no grid", "prior"),
    ("latent", {"latent.npy": write_npy(np.zeros((4, 5), np.float16))}, "has shape [4, 5]", "prior"),
]


@pytest.mark.parametrize(("part", "members", "reason", "kind"), BAD)
def test_malformed_samples_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, members: dict[str, bytes], reason: str, kind: str
) -> None:
    config = tiny_config(tmp_path, data={"max_bad_fraction": 0.2})
    write_tiny_assets(tmp_path)
    write_tiny_sets(config, 20)
    vocabulary = build_vocabulary(config)
    damage(config, part, "train-0013", members)
    steps = {
        "codec": lambda: CodecLoader(config, stage(config, "codec", batch=8)),
        "prior": lambda: prior(config, vocabulary, batch=4),
    }
    if kind == "codec alone":  # a prior's run ends there, see below
        kind = "codec"
        del steps["prior"]
    for name, make in steps.items():
        caplog.clear()
        with make() as loader:
            keys = [key for _ in range(12) for batch in loader.next_step() for key in batch.keys]
            bad = loader.report()["data/bad_samples"]
        if kind in (name, "both"):
            assert bad >= 1
            assert any(reason in message and "train-0013" in message for message in caplog.messages)
        else:
            assert bad == 0
            assert "train-0013" in keys
        assert len(set(keys)) >= 19


@pytest.mark.parametrize("name", awkward_pictures())
def test_every_kind_of_picture_is_trained_on_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config = tiny_config(tmp_path, data={"max_bad_fraction": 0.2})
    write_tiny_sets(config, 20)
    picture = awkward_pictures()[name]
    damage(config, "", "train-0013", {"webp": picture.content})
    with CodecLoader(config, stage(config, "codec", batch=20)) as loader:
        (batch,) = loader.next_step()
    assert batch.images.isfinite().all()
    assert ("train-0013" in batch.keys) == (not picture.refusal)
    named = [message for message in caplog.messages if "train-0013" in message and picture.refusal in message]
    assert bool(named) == bool(picture.refusal)
    if not picture.refusal and picture.size != (20_000, 10):
        corner = (batch.images[batch.keys.index("train-0013")] * 127.5 + 127.5).round()
        middle = corner[:, 8, 8].int().tolist()
        assert near(middle, picture.colour)


def test_a_bad_picture_is_replaced_by_one_of_its_shape(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        codec={"decoder": {"buckets": "aspect"}},
        encoder={"crop": "bucket"},
        data={"max_bad_fraction": 0.5},
    )
    write_tiny_sets(config, 19, grids=GRIDS, sizes=[*SIZES, (32, 128)])  # two of 1:4
    bad = [f"train-{n:04d}" for n in (3, 6)]  # one of 20 x 64, one of 32 x 128
    for key in bad:
        damage(config, "", key, {"webp": b"\x89PNG"})
    with CodecLoader(config, stage(config, "codec", batch=8)) as loader:
        for _ in range(12):
            for batch in loader.next_step():
                assert not set(batch.keys) & set(bad)
                assert batch.images.isfinite().all()
        assert loader.report()["data/bad_samples"] == 2


def test_too_many_malformed_samples_stop_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_tiny_sets(config, 20)
    damage(config, "", "train-0013", {"webp": b""})
    with (
        CodecLoader(config, stage(config, "codec", batch=20)) as loader,
        pytest.raises(DataError, match=r"1 of 20 samples are malformed, the last is train/train-0013"),
    ):
        loader.next_step()


def test_samples_longer_than_a_row_are_counted_and_text_is_cut(config: Config, vocabulary: Vocabulary) -> None:
    short = {"mixture": {"text": 1.0}, "row_positions": 4}
    with prior(config, vocabulary, **short) as loader:
        assert all(segment.length <= 4 for segment in loader.next_step()[0].segments)
    none_fits = {"mixture": {"text_to_image": 1.0}, "row_positions": 8}
    with (
        prior(config, vocabulary, **none_fits) as loader,
        pytest.raises(DataError, match="positions as text_to_image"),
    ):
        loader.next_step()


def test_values_that_are_not_finite_end_the_run_by_name(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_tiny_assets(tmp_path)
    write_tiny_sets(config, 20)
    damage(config, "latent", "train-0003", {"latent.npy": write_npy(np.full((4, 4), np.nan, np.float16))})
    vocabulary = build_vocabulary(config)
    with (
        prior(config, vocabulary, mixture={"text_to_image": 1.0}, batch=16) as loader,
        pytest.raises(DataError, match="'train-0003': the 'latent' part holds values that are not finite"),
    ):
        loader.next_step()
