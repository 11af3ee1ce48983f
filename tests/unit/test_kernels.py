"""Which fused kernels are found and chosen, and that those that run here equal the plain forms. One process."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
import torch

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.schema import KernelsConfig
from unicom_dist.models.attention import AttentionPlan, visible
from unicom_dist.models.flex import FlexPlan, _table, visible_pairs
from unicom_dist.parallel import kernels
from unicom_dist.parallel.kernels import Kernels, choose, detect, is_nvidia_apex
from unicom_dist.testing.segments import random_packing


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, *modules: str) -> None:
    """Let packages called `modules` be found in `folder`, and no others of this kind."""
    real = importlib.util.find_spec

    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        if name in modules:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return (
            None if name in ("apex", "amp_C", "fused_layer_norm_cuda", "transformer_engine", "triton") else real(name)
        )

    monkeypatch.setattr(kernels.importlib.util, "find_spec", find)


def test_pypis_apex_is_named_as_another_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "apex")
    assert is_nvidia_apex() is False
    found = {kernel.option: kernel for kernel in detect(cuda=True)}["fused_adam"]
    assert not found.available
    assert "another project" in found.text
    assert found.remedy.startswith("pip uninstall apex")


def test_apex_without_its_extensions_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "multi_tensor_apply").mkdir()
    install(monkeypatch, tmp_path, "apex", "amp_C")
    found = {kernel.option: kernel.available for kernel in detect(cuda=True)}
    assert found["fused_adam"]
    assert not found["fused_norm"]
    assert not {kernel.option: kernel.available for kernel in detect(cuda=False)}["fused_adam"]


def test_auto_takes_what_is_known_to_be_faster_and_on_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "multi_tensor_apply").mkdir()
    install(monkeypatch, tmp_path, "apex", "amp_C", "triton")
    assert choose(KernelsConfig(), cuda=True) == Kernels(flex_attention=True)
    assert choose(KernelsConfig(fused_adam="on", flex_attention="off"), cuda=True) == Kernels(fused_adam=True)
    assert choose(KernelsConfig(), cuda=False) == Kernels()


@pytest.mark.parametrize("option", ["fused_adam", "fused_norm", "flex_attention"])
def test_insisting_on_a_missing_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str) -> None:
    install(monkeypatch, tmp_path)
    with pytest.raises(PreflightError) as caught:
        choose(KernelsConfig.model_validate({option: "on"}), cuda=False)
    assert caught.value.what == f"kernels.{option} = on"
    assert caught.value.why
    assert caught.value.remedy.endswith(f"kernels.{option}=auto")


@pytest.mark.parametrize("block", [1, 4, 16])
def test_pairs_in_blocks_are_those_of_the_definition(block: int) -> None:
    for seed in range(40):
        segments = random_packing(seed)
        dense = visible(segments).long()
        padding = -len(dense) % block
        dense = torch.nn.functional.pad(dense, (0, padding, 0, padding))
        counted = dense.unflatten(0, (-1, block)).unflatten(2, (-1, block)).sum((1, 3))
        assert torch.equal(visible_pairs(_table(segments), block), counted), segments


def test_flex_attention_sees_exactly_what_is_visible() -> None:
    draw = torch.Generator().manual_seed(0)
    for seed in range(6):
        segments = random_packing(seed)
        plan, positions = FlexPlan.build(segments, "cpu", block=8), sum(s.length for s in segments)
        assert torch.equal(mask_of(plan, positions), visible(segments)), segments
        query = torch.randn(positions, 4, 16, generator=draw)
        key, value = torch.randn(2, positions, 2, 16, generator=draw).unbind(0)
        expected = AttentionPlan.build(segments, torch.float32)(0, query, key, value)
        torch.testing.assert_close(plan(0, query, key, value), expected, rtol=1e-5, atol=1e-5)


def mask_of(plan: FlexPlan, positions: int) -> torch.Tensor:
    """What the block mask lets through: whole blocks, and within partial ones what the rule says."""
    mask, size = plan.mask, plan.mask.BLOCK_SIZE[0]
    index = torch.arange(positions)
    rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    allowed = torch.zeros(positions, positions, dtype=torch.bool)
    for counts, blocks, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in blocks[0, 0, row, :count].tolist():
                place = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
                allowed[place] = True if whole else rule[place]
    return allowed
