"""How long it takes until something happens: the command's answers, and a training run's first step.

`unicom --help` and `unicom config show` are timed as whole processes. For training, a rank that resumes a prior stage
from a checkpoint is timed from its start to the end of its first step; beside it a process that only does what cannot
be saved: the same imports (with those that torch's AdamW makes when it is built, and DeepSpeed when it builds an engine
of ZeRO-3), the rendezvous, and reading the checkpoint's bytes. The difference is what building model, engine and loader
and the first step itself cost. `torch alone` and `DeepSpeed alone` import these and nothing of ours. One rank, one
thread; the clock is the CPU time of the process and the children it waited for, wall time is shown as well.

    python benchmarks/bench_startup.py [--rounds 7]
"""

import argparse
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import Goal, Timing, in_turn, publish

HERE = Path(__file__).resolve()
LIMIT_S, SETUP_S, IMPORT_S = 0.5, 0.5, 2.5
ADAMW = "torch._dynamo"  # what torch's AdamW imports when it is built
# What DeepSpeed imports when it builds an engine of ZeRO-3.
ENGINE = (ADAMW, "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer")


def resume(folder: str, zero_stage: str) -> None:
    """A rank's way from its start to the end of its first step."""
    import torch

    torch.set_num_threads(1)
    from bench_step import configure

    from unicom_dist.parallel.mesh import init_mesh
    from unicom_dist.train.callbacks import Observer
    from unicom_dist.train.loop import start_run, train_step
    from unicom_dist.train.signals import StopRequest
    from unicom_dist.train.watchdog import Watchdog

    config = configure(Path(folder), int(zero_stage), write=False)
    stage = config.stage("pretrain")
    run = start_run(config, stage, init_mesh(config.layout(stage, 1), 60), StopRequest(), Watchdog())
    assert run.step == 1, "it should have resumed"
    with open(os.devnull, "w") as nowhere, Observer(run, nowhere) as observer:
        train_step(run, observer)
        os._exit(0)


def unavoidable(folder: str, zero_stage: str) -> None:
    """Imports, rendezvous, and the bytes of the checkpoint."""
    import torch

    torch.set_num_threads(1)
    import bench_step  # noqa: F401  # imports what the trainer imports

    from unicom_dist.parallel.mesh import init_mesh

    mesh = init_mesh(timeout_s=60)
    importlib.import_module(ADAMW)
    if zero_stage == "3":
        from unicom_dist.parallel.deepspeed_adapter import import_deepspeed

        import_deepspeed(mesh.device)
        for module in ENGINE:
            importlib.import_module(module)
    for path in sorted(Path(folder).rglob("checkpoints/**/*")):
        if path.is_file():
            path.read_bytes()
    os._exit(0)


def prepare(folder: str, zero_stage: str) -> None:
    """Data, and a checkpoint after one step."""
    from bench_step import configure, prepare

    from unicom_dist.parallel.mesh import init_mesh
    from unicom_dist.testing.tiny_run import write_tiny_weights
    from unicom_dist.train.callbacks import Observer
    from unicom_dist.train.loop import save, start_run, train_step
    from unicom_dist.train.signals import StopRequest
    from unicom_dist.train.watchdog import Watchdog

    config = configure(Path(folder), int(zero_stage))
    prepare(config)
    # A checkpoint of the prior names the codec that made its latents.
    write_tiny_weights(config.model_copy(update={"stages": [config.stage("codec")]}))
    stage = config.stage("pretrain")
    run = start_run(config, stage, init_mesh(config.layout(stage, 1), 60), StopRequest(), Watchdog())
    with open(os.devnull, "w") as nowhere, Observer(run, nowhere) as observer:
        train_step(run, observer)
        save(run)
        run.store.wait()
    os._exit(0)


def rank(what: str, folder: Path, zero_stage: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a rank in a process of its own, which ends where `what` does."""
    with tempfile.TemporaryDirectory() as meeting:
        env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "UNICOM_RENDEZVOUS": f"{meeting}/file"}
        return process([sys.executable, "-W", "ignore", str(HERE), "--do", what, str(folder), str(zero_stage)], env)


def imports(*modules: str) -> tuple[float, float]:
    """(CPU, wall) seconds of a Python that imports `modules`."""
    code = f"import {', '.join(modules)}, os; os._exit(0)"
    return process([sys.executable, "-W", "ignore", "-c", code], {"DS_ACCELERATOR": "cpu"})


def command(arguments: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds of a whole `unicom` process."""
    return process([shutil.which("unicom", path=str(Path(sys.executable).parent)) or "unicom", *arguments], {})


def process(arguments: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(CPU, wall) seconds of a process and of the children it waited for."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        arguments, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, check=False
    )
    after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--do", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        {"resume": resume, "unavoidable": unavoidable, "prepare": prepare}[options.do[0]](*options.do[1:])
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as name:
        folders = {stage: Path(name) / str(stage) for stage in (0, 3)}
        for stage, folder in folders.items():
            rank("prepare", folder, stage)
        methods = {
            "unicom --help": partial(command, ["--help"]),
            "unicom config show": partial(command, ["config", "show", "recipes/quickstart.yaml"]),
            "torch alone": partial(imports, "torch", ADAMW),
            "DeepSpeed alone": partial(imports, "torch", "deepspeed", *ENGINE),
        }
        for stage, folder in folders.items():
            engine = "ZeRO-3" if stage else "plain"
            methods[f"{engine}: imports, rendezvous, read"] = partial(rank, "unavoidable", folder, stage)
            methods[f"{engine}: resume to first step"] = partial(rank, "resume", folder, stage)
        seconds = in_turn(methods, options.rounds)  # the round that does not count fills the page cache
    cpu = {method: Timing.of([c for c, _ in values]) for method, values in seconds.items()}
    wall = {method: Timing.of([w for _, w in values]) for method, values in seconds.items()}
    goals = [Goal(m, cpu[m].median, LIMIT_S, at_least=False, unit="s") for m in ("unicom --help", "unicom config show")]
    for engine in ("plain", "ZeRO-3"):
        over = cpu[f"{engine}: resume to first step"].median - cpu[f"{engine}: imports, rendezvous, read"].median
        goals.append(Goal(f"{engine}: first step beyond imports and read", over, SETUP_S, at_least=False, unit="s"))
    imported = cpu["plain: imports, rendezvous, read"].median
    goals.append(Goal("plain: imports, rendezvous, read", imported, IMPORT_S, at_least=False, unit="s"))
    met = publish(
        "bench_startup",
        ["what", "CPU s", "wall s", "spread of CPU"],
        [[method, f"{cpu[method].median:.2f}", f"{wall[method].median:.2f}", cpu[method].spread] for method in methods],
        goals,
        {
            m: {"cpu_s": cpu[m].median, "wall_s": wall[m].median, "low": cpu[m].low, "high": cpu[m].high}
            for m in methods
        },
        ("deepspeed", "typer", "pydantic"),
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
