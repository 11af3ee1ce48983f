"""What engines and average of a stage with frozen weights hold between two steps, against the plan. 2 gloo ranks."""

import gc

import pytest
import torch
from torch import Tensor

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig, PriorConfig, QueryConfig
from unicom_dist.models.query_guided import QueryGuided
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel.deepspeed_adapter import import_deepspeed
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import Engine, OptimizerConfig
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.plan.activations import Batch
from unicom_dist.plan.memory import rank_memory
from unicom_dist.plan.parameters import Sizes, Trained
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.testing.tiny_batch import tiny_batch
from unicom_dist.train.ema import Ema

pytestmark = pytest.mark.dist
WORLD, STAGES = 2, (0, 1, 2, 3)
PRIOR = PriorConfig(hidden=64, layers=4, heads=4, kv_heads=2, ffn=160, max_grid=8)
QUERY = QueryConfig(enabled=True, queries=4, connector_layers=1, decoder_layers=2, decoder_width=32)
SIZES = Sizes(vocabulary=900, latent_channels=4, feature_channels=6)
TRAINED = {"all": Trained(), "connector": Trained("connector"), "query": Trained(query=QUERY)}
# DeepSpeed allocates its buckets, of a size that no model decides, at the start; small weights stay gathered.
SMALL = {"zero_optimization": {"reduce_bucket_size": 1 << 10, "stage3_param_persistence_threshold": 0}}


def live_bytes() -> int:
    """Of all tensors made since `gc.freeze`, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def trained_once(stage: int, trained: Trained, mesh: Mesh) -> tuple[Engine, Ema]:
    """A step of bfloat16."""
    if trained.query is None:
        module = Transfusion(PRIOR, SIZES.vocabulary, SIZES.latent_channels, SIZES.feature_channels)
    else:
        module = QueryGuided(PRIOR, QUERY, SIZES.vocabulary, SIZES.latent_channels, SIZES.feature_channels)
    module.train_only(trained.part)
    layout = Layout(dp=WORLD, zero_stage=stage)
    settings = deepspeed_config(ParallelConfig(zero_stage=stage), layout, "bfloat16", SMALL if stage == 3 else {})
    options = OptimizerConfig()
    engine = PlainEngine(module, options, mesh) if stage == 0 else ZeroEngine(module, options, mesh, settings)
    ema = Ema(engine.state(), 0.9)
    batch = tiny_batch([[("text", 5), ("latent", 4)], [("feature", 4), ("text", 3)]], SIZES.vocabulary, 4, 6)
    with engine.accumulate():
        text, velocity = engine(batch)[:2]
        engine.backward(velocity.sum() + text.sum())
    engine.step(1e-4)
    ema.update()
    return engine, ema


def work(rank: int, world: int) -> dict[tuple[str, int], int]:
    found, device = {}, torch.device("cpu")
    import_deepspeed(device)
    for name, trained in TRAINED.items():
        for stage in STAGES:
            mesh = init_mesh(Layout(dp=world, zero_stage=stage))
            gc.collect()
            gc.freeze()
            engine, ema = trained_once(stage, trained, mesh)
            found[name, stage] = live_bytes()
            gc.unfreeze()
            engine.close()
            del engine, ema
    return found


@pytest.fixture(scope="module")
def held() -> list[dict[tuple[str, int], int]]:
    return run_ranks(work, WORLD, timeout_s=280)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("stage", STAGES)
def test_between_steps_a_rank_holds_what_is_planned(
    held: list[dict[tuple[str, int], int]], name: str, stage: int
) -> None:
    trained = TRAINED[name]
    plan = rank_memory(PRIOR, SIZES, Layout(dp=WORLD, zero_stage=stage), Batch(0, 0, 1), 0, trained=trained)
    states = plan.weights + plan.optimizer + plan.average
    if stage == 0:
        states += plan.gradients  # allocated once
    elif stage == 3:  # DeepSpeed keeps the reduced ones (4 / WORLD bytes), not those of the passes (2)
        states += plan.gradients * (4 / WORLD) / (2 + 4 / WORLD)
    for rank in held:
        assert rank[name, stage] == pytest.approx(states, rel=0.03)
