"""What `precision: auto` means on a machine."""

import pytest
import torch

from unicom_dist.parallel.precision import training_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fma avx2 avx512f avx512_bf16", torch.bfloat16),
        ("amx_bf16 amx_tile", torch.bfloat16),
        ("fma avx2", torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, tmp_path, flags, dtype):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr("unicom_dist.parallel.precision.CPUINFO", info)
    assert training_dtype("auto", CPU) == dtype


def test_auto_is_float32_where_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr("unicom_dist.parallel.precision.CPUINFO", tmp_path / "absent")
    assert training_dtype("auto", CPU) == torch.float32


def test_a_gpu_and_a_wish_are_taken_as_they_are():
    assert training_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert training_dtype("float32", torch.device("cuda")) == torch.float32
    assert training_dtype("bfloat16", CPU) == torch.bfloat16
