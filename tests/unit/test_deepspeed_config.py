"""DeepSpeed's generated configuration: what follows from ours, what `deepspeed.extra` may change and what not."""

import pytest

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_config import OURS, deepspeed_config, leaves

ZERO3 = Layout(dp=4, zero_stage=3)


def zero_of(layout: Layout, precision: str = "bfloat16", extra=None, **parallel):
    """Its section on ZeRO."""
    config = ParallelConfig(zero_stage=layout.zero_stage, **parallel)
    return deepspeed_config(config, layout, precision, extra)["zero_optimization"]


def test_extra_is_merged_key_by_key():
    plain = zero_of(ZERO3)
    changed = zero_of(ZERO3, extra={"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}})
    assert changed == {**plain, "reduce_bucket_size": 7, "overlap_comm": True}
    offload = zero_of(ZERO3, offload="cpu", extra={"zero_optimization": {"offload_param": {"pin_memory": False}}})
    assert offload["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_gather_once_keeps_nothing_gathered_between_steps():
    assert zero_of(Layout(dp=4, zero_stage=3, gather_once=True))["stage3_param_persistence_threshold"] == 0
    assert zero_of(ZERO3)["stage3_param_persistence_threshold"] > 0


@pytest.mark.parametrize("key", OURS)
def test_what_the_engine_relies_on_is_refused_with_what_to_set_instead(key):
    extra: object = 1
    for part in reversed(key.split(".")):
        extra = {part: extra}
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(ParallelConfig(), ZERO3, "bfloat16", extra)
    assert key in caught.value.what
    assert caught.value.why
    assert caught.value.remedy


def test_a_whole_section_of_ours_is_refused_as_well():
    with pytest.raises(ConfigError, match="bf16"):
        deepspeed_config(ParallelConfig(), ZERO3, "float32", {"bf16": {"enabled": True}})


def test_a_misspelt_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="zero_optimization"):
        deepspeed_config(ParallelConfig(), ZERO3, "float32", {"zero_optimisation": {"overlap_comm": True}})


@pytest.mark.parametrize(
    ("key", "value", "layout", "works"),
    [
        ("zero_hpz_partition_size", 2, Layout(dp=4, zero_stage=3), True),
        ("zero_hpz_partition_size", 2, Layout(dp=4, pp=2, zero_stage=3), True),
        ("zero_hpz_partition_size", 3, Layout(dp=4, zero_stage=3), False),
        ("zero_hpz_partition_size", 2, Layout(dp=4, tp=2, zero_stage=3), False),
        ("zero_quantized_gradients", True, Layout(dp=4, zero_stage=3), True),
        ("zero_quantized_gradients", True, Layout(dp=4, pp=2, zero_stage=3), False),
    ],
)
def test_zero_plus_plus_where_its_groups_are_ours(key, value, layout, works):
    extra = {"zero_optimization": {key: value}}
    if works:
        assert zero_of(layout, extra=extra)[key] == value
    else:
        with pytest.raises(ConfigError, match=key):
            zero_of(layout, extra=extra)


def test_leaves_are_dotted():
    assert leaves({"a": {"b": 1, "c": {}}, "d": [2]}) == [("a.b", 1), ("a.c", {}), ("d", [2])]
