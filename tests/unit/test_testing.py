"""The test helpers: ranks that cannot hang or outlive the call, and tiny assets. 2 processes, 30 s."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer as Fast

from unicom_dist.config.errors import ConfigError
from unicom_dist.data.text import Vocabulary
from unicom_dist.testing.distributed import RankFailure, run_ranks
from unicom_dist.testing.tiny import SPECIAL_TOKENS, tiny_config, write_pictures, write_tiny_assets

TEXT = "a red circle, 12 Ünïcödé 🙂\n"


def sum_over_ranks(rank: int, world_size: int, start: int) -> tuple[torch.Tensor, str]:
    total = torch.tensor([float(rank + start)])
    dist.all_reduce(total)
    return total, os.environ["WORLD_SIZE"]


def fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(9)
    dist.barrier()


def hang_on_one(rank: int, world_size: int, folder: str) -> None:
    (Path(folder) / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)
    dist.barrier()


@pytest.mark.dist
def test_results_come_back_in_rank_order():
    results = run_ranks(sum_over_ranks, 2, 3)
    assert [float(total) for total, _ in results] == [7.0, 7.0]
    assert [world for _, world in results] == ["2", "2"]
    assert "RANK" not in os.environ


@pytest.mark.dist
def test_a_failing_rank_ends_the_others_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankFailure, match="this rank is broken"):
        run_ranks(fail_on_one, 2, timeout_s=90)
    assert time.monotonic() - start < 60


@pytest.mark.dist
def test_a_dying_rank_is_named_with_its_exit_code():
    with pytest.raises(RankFailure, match="rank 1 died with exit code 9"):
        run_ranks(die_on_one, 2, timeout_s=90)


@pytest.mark.dist
def test_a_hang_shows_every_stack_and_leaves_no_process(tmp_path):
    with pytest.raises(RankFailure) as caught:
        run_ranks(hang_on_one, 2, str(tmp_path), timeout_s=20)
    text = str(caught.value)
    assert "--- rank 0 ---" in text
    assert text.count("in hang_on_one") == 2
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_tiny_configuration_stays_below_its_folder(tmp_path):
    config = tiny_config(tmp_path, parallel={"nproc": 2}, stages={"codec": {"steps": 9}}, seed=3)
    assert (config.parallel.nproc, config.stage("codec").steps, config.seed) == (2, 9, 3)
    assert [stage.kind for stage in config.stages] == ["codec", "latents", *["prior"] * 4]
    for path in (config.run_dir, config.data.source, config.data.path, config.prior.tokenizer):
        assert Path(path).is_relative_to(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.imge_px"):
        tiny_config(tmp_path, data={"imge_px": 3})


def test_tiny_tokenizer_has_the_special_tokens_and_every_byte(tmp_path):
    assets = write_tiny_assets(tmp_path)
    vocabulary = Vocabulary.full(assets.tokenizer)
    assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT
    assert len(vocabulary.encode("a red circle")) < len("a red circle") / 2
    fast = Fast.from_file(str(assets.tokenizer / "tokenizer.json"))
    special = [fast.token_to_id(token) for token in SPECIAL_TOKENS]
    assert special == list(range(special[0], special[0] + len(SPECIAL_TOKENS)))
    assert fast.decode(fast.encode("".join(map(chr, range(1, 256)))).ids) == "".join(map(chr, range(1, 256)))


def test_tiny_assets_are_the_same_on_every_call(tmp_path):
    first, second = write_tiny_assets(tmp_path / "a"), write_tiny_assets(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first.tokenizer / name).read_bytes() == (second.tokenizer / name).read_bytes()
    files = sorted(path.name for path in first.pictures.iterdir())
    assert len(files) == 48
    assert all((first.pictures / name).read_bytes() == (second.pictures / name).read_bytes() for name in files)


def test_tiny_pictures_show_what_their_caption_says(tmp_path):
    from PIL import Image

    captions = write_pictures(tmp_path, 18)
    assert len(set(captions)) == 18
    red = Image.open(tmp_path / "circle-red-000.png").getpixel((16, 16))
    blue = Image.open(tmp_path / "square-blue-000.png").getpixel((16, 16))
    assert red[0] > 2 * max(red[1:])
    assert blue[2] > 2 * max(blue[:2])
