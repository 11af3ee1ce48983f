"""How the ZeRO engines come to be: never a whole model on a rank, and DeepSpeed's behaviour where it is relied on."""

import gc
import importlib

import pytest
import torch
from torch import Tensor, nn

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_adapter import ORDER, import_deepspeed, module_counter, scope_order_check
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import OptimizerConfig, whole_tensors
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
WORLD, WIDTH, LAYERS = 2, 128, 12


class Deep(nn.Module):
    """Equal layers; the last one is the first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        self.layers.append(nn.Linear(WIDTH, WIDTH, bias=False))
        self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x.float()


def value(name: str) -> Tensor:
    """Of a parameter, from its name alone."""
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(int(name.split(".")[1]))) / WIDTH**0.5


def live_bytes() -> int:
    """Of all tensors made since `gc.freeze`, each storage once."""
    gc.collect()  # what only waits to be collected is not alive
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def build(stage: int, precision: str, mesh: Mesh, watched: list[int]) -> ZeroEngine:
    """An engine of a module on the meta device; `watched` gets what was alive when each parameter was asked for."""

    def initial(name: str, parameter: nn.Parameter) -> Tensor:
        watched.append(live_bytes())
        return value(name)

    with torch.device("meta"):
        module = Deep()
    settings = deepspeed_config(ParallelConfig(), Layout(dp=WORLD, zero_stage=stage), precision)
    return ZeroEngine(module, OptimizerConfig(precision=precision), mesh, settings, initial)


def work(rank: int, world: int) -> dict[object, object]:
    mesh, found = init_mesh(timeout_s=60), {}
    deepspeed = import_deepspeed(mesh.device)
    deepspeed.zero.Init.param_id += rank  # as after engines of pp_stages with unequal numbers of parameters
    module_counter()[0] += rank
    gc.freeze()
    for stage in (1, 2, 3):
        for precision in ("float32", "bfloat16"):
            watched = [live_bytes()]
            engine = build(stage, precision, mesh, watched)
            found["live", stage, precision] = [seen - watched[0] for seen in watched[1:]]
            found["tied", stage] = engine.module.layers[-1].weight is engine.module.layers[0].weight
            weights = engine.state()["weight"]
            found["weights", stage, precision] = dict(
                whole_tensors(mesh, weights, engine.fragments, False, torch.float32)
            )
            with engine.accumulate():
                out = engine(torch.ones(2, WIDTH))
                engine.backward(out.square().mean())
            found["norm", stage, precision] = engine.step(1e-2)
            engine.close()
    ORDER.agree(mesh)
    ORDER.note([rank])
    with pytest.raises(RuntimeError, match="different orders"):
        ORDER.agree(mesh)
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, WORLD, timeout_s=200)


@pytest.mark.parametrize(("precision", "low"), [("float32", 4), ("bfloat16", 2)])
def test_beside_the_shards_there_is_one_whole_parameter_at_a_time(ranks, precision, low):
    each = WIDTH * WIDTH
    for rank in ranks:
        live = rank["live", 3, precision]
        assert len(live) == LAYERS
        for number, seen in enumerate(live):
            shards = number * each / WORLD * (4 + low)
            assert shards <= seen <= shards + each  # a quarter of a parameter's bytes, for small things


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_master_weights_are_the_initial_ones_exactly(ranks, stage, precision):
    weights = ranks[0]["weights", stage, precision]
    assert sorted(weights) == sorted(f"layers.{number}.weight" for number in range(LAYERS))
    for name, weight in weights.items():
        assert torch.equal(weight, value(name)), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tied_parameters_stay_tied_and_train(ranks, stage):
    assert all(rank["tied", stage] for rank in ranks)
    alone = Deep()
    for name, parameter in alone.named_parameters():
        parameter.data = value(name)
    alone(torch.ones(2, WIDTH)).square().mean().backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()]))
    assert ranks[0]["norm", stage, "float32"] == pytest.approx(norm, rel=1e-5)
    assert ranks[0]["norm", stage, "bfloat16"] == pytest.approx(norm, rel=5e-2)


def test_another_order_check_in_deepspeed_is_noticed(monkeypatch):
    deepspeed = import_deepspeed(torch.device("cpu"))
    scope_order_check(deepspeed)  # as often as one likes
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    name = "assert_ints_same_as_other_ranks"
    assert getattr(coordinator, name) == ORDER.note
    monkeypatch.setattr(coordinator, name, lambda ids, group: None)
    with pytest.raises(PreflightError, match="reset_step"):
        scope_order_check(deepspeed)
