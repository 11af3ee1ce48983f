"""env.json of a run directory: the software, the machine and the commit a run used.

Versions are read from package metadata, so nothing heavy is imported for them; devices are listed only when torch is
loaded already. Of the process environment only a few variables that change results or speed are kept: the rest may hold
secrets.
"""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from unicom_dist.parallel.kernels import detect

ENV_FILE = "env.json"
PACKAGES = (
    "unicom-dist", "torch", "deepspeed", "transformers", "diffusers", "ray", "mlflow", "webdataset", "safetensors",
    "tokenizers", "numpy", "pillow", "pydantic", "pyarrow",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_ALGO", "NCCL_PROTO", "PYTORCH_CUDA_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "WORLD_SIZE",
)  # fmt: skip


def collect_env(argv: list[str] | None = None) -> dict[str, Any]:
    """The environment of this process as plain values; `argv` is the command to remember (default `sys.argv`)."""
    command = sys.argv if argv is None else argv
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [*(Path(name).name for name in command[:1]), *command[1:]],  # as typed, wherever it is installed
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "devices": _devices(),
        "kernels": {kernel.title: kernel.text for kernel in detect(cuda=bool(_devices()))},
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def write_env(run_dir: str | Path, argv: list[str] | None = None, layout: str = "") -> dict[str, Any]:
    """Write env.json: this start's environment, and under `starts` time, command, commit and host of every start.

    `layout`: the table of which rank is where, if the ranks share the model.
    """
    path = Path(run_dir) / ENV_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    env = collect_env(argv) | ({"layout": layout.splitlines()} if layout else {})
    earlier = read_env(run_dir).get("starts", [])
    env["starts"] = [*earlier, {key: env[key] for key in ("time", "command", "commit", "host")}]
    temporary = path.with_name(f".{ENV_FILE}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(env, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return env


def read_env(run_dir: str | Path) -> dict[str, Any]:
    """What `write_env` wrote; {} when there is none or it is damaged."""
    try:
        item = json.loads((Path(run_dir) / ENV_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return item if isinstance(item, dict) else {}


def commit() -> str:
    """Commit of the source the package runs from, `+changes` added where the work tree differs; "" when unknown."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return f"{head}+changes" if head and changed else head
    try:  # installed with pip from a repository: PEP 610
        direct = importlib.metadata.distribution("unicom-dist").read_text("direct_url.json") or "{}"
        return str(json.loads(direct).get("vcs_info", {}).get("commit_id", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return 0.0


def _devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
