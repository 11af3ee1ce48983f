"""One rank: joins the others, runs training stages one after the other in one process group, and says how it ended.

Started by `launch` with {"folder": where logs go, "runs": [{"config": …, "stages": [names]}, …]} as one line of JSON on
standard input: the stages of one run, or of several. Everything that libraries print goes to this rank's log; only
rank 0's own console line reaches the terminal.
"""

import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from unicom_dist.config.errors import HangError, NonFiniteError, PreflightError, UnicomError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import Config
from unicom_dist.config.storage import storage_error
from unicom_dist.train.launch import STACK_SIGNAL, error_path, log_path
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.watchdog import Watchdog

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, NCCL


def main() -> int:
    """Entry of the process; returns its exit status."""
    spec = json.loads(sys.stdin.buffer.readline())
    runs = [(Config.model_validate(item["config"]), item["stages"]) for item in spec["runs"]]
    folder, rank = Path(spec["folder"]), int(os.environ["RANK"])
    terminal = _redirect(log_path(folder, rank))
    quiet_libraries()
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    with StopRequest() as stop:
        stop.watch(sys.stdin.buffer)
        try:
            for number, (config, names) in enumerate(runs, 1):
                if len(runs) > 1 and rank == 0:
                    print(f"{config.name} ({number} of {len(runs)})", file=terminal)
                run_stages(config, names, stop, partial(_report, run_dir=folder, rank=rank), terminal)
            return 0
        except BaseException as error:
            return _report(error, folder, rank)


def run_stages(
    config: Config,
    names: list[str],
    stop: StopRequest,
    stalled: Callable[[HangError], object],
    terminal: IO[str] | None = None,
) -> None:
    """Train the named stages in order on this rank. Collective over the world. `terminal`: where rank 0 shows progress.

    `stalled(error)` is the last that is called when this rank does not get on: its watchdog then ends the process.
    ConfigError: the layout or a batch does not suit the ranks that are there. Preempted, after a checkpoint: a stop was
    requested on some rank.
    """
    import torch

    from unicom_dist.parallel.mesh import Mesh, init_mesh
    from unicom_dist.parallel.precision import with_precision
    from unicom_dist.train.loop import check_ranks, train_stage

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    everyone = init_mesh(timeout_s=config.parallel.timeout_s)
    config = with_precision(config, everyone)
    check_ranks(config, everyone.world)
    meshes: dict[Layout, Mesh] = {}  # a codec and a prior may be laid out differently
    with Watchdog(config.parallel.stall_s, stalled, stop.hung) as dog:
        for name in names:
            stage = config.stage(name)
            layout = config.layout(stage, everyone.world)
            if layout not in meshes:
                meshes[layout] = init_mesh(layout, config.parallel.timeout_s)
            train_stage(config, stage, meshes[layout], stop, dog, terminal)


def _redirect(log: Path) -> IO[str]:
    """Send file descriptors 1 and 2 to the rank's log; the terminal they were is returned."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    return terminal


def quiet_libraries() -> None:
    """Silence warnings that libraries address to their own developers."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _report(error: BaseException, run_dir: Path, rank: int) -> int:
    """Leave the error for the launcher, the traceback in the log; the exit status."""
    known = known_error(error, rank, f"the traceback is in {log_path(run_dir, rank)}")
    with suppress(OSError):  # the log may be on the disk that is full
        if not isinstance(error, UnicomError):
            traceback.print_exception(error, file=sys.stderr)
        elif not isinstance(error, NonFiniteError):
            print(error, file=sys.stderr)
    consequence = known is not error and not isinstance(known, PreflightError)  # perhaps, of another rank's end
    record = {**known.record(), "unexpected": consequence, "time": time.time()}
    try:
        with error_path(run_dir, rank).open("x", encoding="utf-8") as file:
            file.write(json.dumps(record))
    except FileExistsError:  # the watchdog's: what the end of other ranks does to this one says less
        pass
    except OSError:
        logging.getLogger(__name__).warning("the error could not be left for the launcher")
    return known.exit_code


def known_error(error: BaseException, rank: int, where: str) -> UnicomError:
    """An error for the user: this one, or what an unexpected one means. `where` its traceback is."""
    if isinstance(error, UnicomError):
        return error
    refused = storage_error(error)
    if refused is not None:
        refused.why += f" (rank {rank}; {where})"
        return refused
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if "imed out" in text:
        return HangError(f"rank {rank} waited too long for the others", f"{text}; {where}", "run again to continue")
    if any(sign in str(error) for sign in PEER_GONE):
        return HangError(
            f"rank {rank} lost another rank", f"{text}; {where}", "see that rank's log; run again to continue"
        )
    return UnicomError(f"rank {rank} failed: {text}", where, "run the same command again: it continues")


if __name__ == "__main__":
    os._exit(main())  # engines, threads and process groups have nothing left to say, and some take seconds to say it
