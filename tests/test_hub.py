"""Models on the Hub: what is transferred, that it is the same model, and what happens when it cannot be had.

The Hub is `hub_server.py`, on this machine; huggingface_hub is the real one.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

import matexport as mx
from hub_server import Answer, Fault, Hub, Request, serving
from matexport.checkpoint import open_checkpoint
from matexport.errors import CheckpointError, MissingError
from matexport.hub import Repository, is_id, open_repository
from matexport.manifest import describe_source
from support import Result, content, language_checkpoint, matexport, matexport_process, vision_config, vision_tensors

NAME = "org/name"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards, layer 1 alone in the second one, with files that a slice needs and others."""
    path = tmp_path_factory.mktemp("hub") / "name"
    path.mkdir()
    config = vision_config()
    tensors = vision_tensors(config)
    (path / "config.json").write_text(json.dumps(config))
    (path / "slices.csv").write_text(
        'name,Layers Skipped,Mamba Dims\nfull,,64\nhalf,,32\nshallow,[1],64\nthin,[1],"32"\n'
    )
    groups: dict[str, dict[str, np.ndarray]] = {"first": {}, "second": {}, "third": {}}
    for name, array in tensors.items():
        layer = name.split(".")[1] if name.startswith("layers.") else "0"
        groups[{"0": "first", "1": "second", "2": "third"}[layer]][name] = array
    weight_map = {}
    for shard, arrays in groups.items():
        save_file(arrays, path / f"{shard}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, f"{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "LICENSE").write_text("free")
    (path / "tokenizer.json").write_text("{}")
    (path / "evil.py").write_text("raise SystemExit")
    (path / "optimizer.bin").write_bytes(b"0" * 100_000)
    (path / "original").mkdir()
    (path / "original" / "tokenizer.model").write_bytes(b"0" * 100_000)
    return path


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving() as server:
        server.publish(NAME, folder)
        yield server


@pytest.fixture(autouse=True)
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub of this process talks to our server, with an empty cache, and nobody waits."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def header_bytes(path: Path) -> int:
    """Length of the header of a safetensors file, its eight bytes of length included."""
    with path.open("rb") as f:
        return int(struct.unpack("<Q", f.read(8))[0]) + 8


def headers_of(folder: Path) -> int:
    return sum(header_bytes(path) for path in folder.glob("*.safetensors"))


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fails(result: Result, code: int, *messages: str) -> None:
    assert result.code == code, result
    for message in (*messages, "fix: "):
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


# ------------------------------------------------------------------------------------ what is transferred
@pytest.mark.parametrize(
    "arguments", [["slices"], ["slice", "-s", "half", "--dry-run"], ["inspect"], ["slices", "--fit", "200KB"]], ids=str
)
def test_planning_transfers_headers_only(hub: Hub, folder: Path, arguments: list[str]) -> None:
    remote = matexport(arguments[0], "-m", NAME, *arguments[1:])
    local = matexport(arguments[0], "-m", folder, *arguments[1:])
    assert remote.code == 0, remote
    assert remote.stdout == local.stdout
    assert "Fetching" not in remote.stderr
    assert all(request.range for request in hub.weights())
    assert sum(request.sent for request in hub.weights()) == headers_of(folder)
    small = {"config.json", "slices.csv", "model.safetensors.index.json"}
    whole = {request.file for request in hub.requests if request.method == "GET" and "/resolve/" in request.path}
    assert {file for file in whole if not file.endswith(".safetensors")} == small
    assert sum(request.sent for request in hub.requests) < weights_of(folder) / 10


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["download", "stream"])
@pytest.mark.parametrize("row", ["half", "shallow", "thin"])
def test_a_slice_of_a_repository_is_the_slice_of_its_folder(
    hub: Hub, folder: Path, tmp_path: Path, row: str, options: list[str]
) -> None:
    result = matexport("slice", "-m", NAME, "-s", row, "-o", tmp_path / "remote", *options)
    assert result.code == 0, result
    assert "Fetching" not in result.stderr
    assert matexport("slice", "-m", folder, "-s", row, "-o", tmp_path / "local").code == 0
    remote, local = content(tmp_path / "remote"), content(tmp_path / "local")
    assert remote.keys() == local.keys()
    assert {"LICENSE", "tokenizer.json"} <= remote.keys()
    assert not {"evil.py", "optimizer.bin", "tokenizer.model"} & {request.file for request in hub.requests}
    for name in remote.keys() - {"matexport.json", "README.md"}:  # they say where the slice is from
        assert remote[name] == local[name], name
    ours, theirs = json.loads(remote["matexport.json"]), json.loads(local["matexport.json"])
    commit = hub.repositories[NAME].branches["main"]
    assert ours["source"] == {**theirs["source"], "name": NAME, "revision": commit}
    assert (ours["tensors"], ours["slice"]) == (theirs["tensors"], theirs["slice"])
    whole = {request.file for request in hub.weights() if request.range is None}
    shards = {"first.safetensors", "third.safetensors"} | ({"second.safetensors"} if row == "half" else set())
    assert whole == (set() if options else shards)
    assert matexport("verify", "-m", tmp_path / "remote", "--source", folder).code == 0


def test_streaming_reads_what_the_slice_holds(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mx.plan(NAME, "shallow").write(tmp_path / "out", stream=True)
    needed = mx.plan(folder, "shallow").plan.nbytes
    served = sum(request.sent for request in hub.weights())
    assert needed <= served <= 1.02 * needed + headers_of(folder)
    assert served < 0.75 * weights_of(folder)  # or the bound would say nothing
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_streaming_reads_columns_by_whole_rows(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are cut out of blocks of rows: a request for every row would take a thousand times longer."""
    folder = language_checkpoint(tmp_path / "l" / "model", d_model=64)
    hub.publish("org/language", folder)
    planned = mx.plan("org/language", "half", table=_table(tmp_path))
    planned.write(tmp_path / "out", stream=True)
    served = [request for request in hub.weights() if request.sent]
    tensors = planned.plan.tensors.values()
    whole = {t.view.source: planned.checkpoint.tensors[t.view.source].nbytes for t in tensors}
    assert sum(request.sent for request in served) <= sum(whole.values()) + 2 * headers_of(folder)
    assert len(served) <= 4 * len(whole)


def _table(folder: Path) -> Path:
    path = folder / "table.csv"
    path.write_text("name,Mamba Dims\nhalf,32\n")
    return path


def test_a_folder_and_its_repository_are_the_same_source(hub: Hub, folder: Path) -> None:
    remote = open_checkpoint(NAME)
    before = describe_source(remote)
    assert before["files"] == describe_source(open_checkpoint(folder))["files"]
    remote.fetch(remote.tensors)
    assert describe_source(remote) == before
    assert describe_source(open_checkpoint(NAME)) == before
    assert "revision" not in describe_source(open_checkpoint(folder))


def test_what_is_in_the_cache_is_not_transferred_again(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mx.slice(NAME, "half", tmp_path / "a")
    hub.requests.clear()
    mx.slice(NAME, "thin", tmp_path / "b")
    mx.slice(NAME, "thin", tmp_path / "c", stream=True)
    assert hub.weights() == []
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_a_verified_onnx_from_a_repository(hub: Hub, tmp_path: Path) -> None:
    assert matexport("onnx", "-m", NAME, "-s", "thin", "-o", tmp_path / "onnx").code == 0
    assert {r.file for r in hub.weights() if r.range is None} == {"first.safetensors", "third.safetensors"}
    assert {"LICENSE", "tokenizer.json"} <= content(tmp_path / "onnx").keys()
    result = matexport("verify", "-m", tmp_path / "onnx", "--source", f"{NAME}@main")
    assert result.code == 0, result
    assert "second.safetensors" in {request.file for request in hub.weights() if request.range is None}


def test_a_published_slice_says_where_it_is_from(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mx.slice(folder, "half", tmp_path / "half")
    hub.publish("org/half", tmp_path / "half")
    found = matexport("inspect", "-m", "org/half", "--format", "json").json
    assert (found["kind"], found["slice"]["name"], found["source"]["name"]) == ("checkpoint", "half", "name")
    assert found["layers"] == 3


# -------------------------------------------------------------------------------------------- revisions
def test_revisions(hub: Hub, folder: Path, tmp_path: Path) -> None:
    other = language_checkpoint(tmp_path / "other")
    commit = hub.repositories[NAME].commit(other, branch="lm/small")
    for revision in ("lm/small", commit):
        assert open_checkpoint(f"{NAME}@{revision}").config["vocab_size"] == 101
    assert "n_classes" in open_checkpoint(NAME).config


@pytest.mark.parametrize("stream", [False, True])
def test_a_branch_that_moves_changes_nothing(hub: Hub, folder: Path, tmp_path: Path, stream: bool) -> None:
    planned = mx.plan(NAME, "half")
    first = hub.repositories[NAME].branches["main"]
    hub.repositories[NAME].commit(language_checkpoint(tmp_path / "other"))
    planned.write(tmp_path / "remote", stream=stream)
    assert json.loads((tmp_path / "remote" / "matexport.json").read_text())["source"]["revision"] == first
    mx.slice(folder, "half", tmp_path / "local")
    weights = "model.safetensors"
    assert (tmp_path / "remote" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
    assert "vocab_size" in open_checkpoint(NAME).config  # the branch did move


# ------------------------------------------------------------------------------- offline, as a user is
def test_offline(hub: Hub, folder: Path, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    arguments = ("slice", "-m", NAME, "-s", "half", "-o")
    fails(matexport_process(*arguments, tmp_path / "a", **offline), 5, f"error: {NAME}", "offline mode is on")
    assert matexport_process("slices", "-m", NAME, **environment).code == 0
    result = matexport_process(*arguments, tmp_path / "a", **offline)  # shards are not in the cache yet
    fails(result, 5, "offline mode is on", f"hf download {NAME}")
    online = matexport_process(*arguments, tmp_path / "a", **environment)
    assert online.code == 0, online
    requests = len(hub.requests)
    assert matexport_process(*arguments, tmp_path / "b", **offline).code == 0
    assert matexport_process("slices", "-m", NAME, **offline).code == 0
    assert len(hub.requests) == requests
    assert content(tmp_path / "a") == content(tmp_path / "b")
    tokens = {(request.host, request.token) for request in hub.requests}
    assert tokens == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}  # not to the other origin
    assert TOKEN not in online.stdout + online.stderr
    assert all(TOKEN.encode() not in data for data in content(tmp_path / "a").values())


def test_the_client_is_imported_when_it_is_needed(tmp_path: Path, folder: Path) -> None:
    code = (
        "import sys\nfrom matexport.cli.main import main\nmain(sys.argv[1:])\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    for arguments in (["--help"], ["slice", "--help"], ["slice", "-m", str(folder), "-s", "half", "--dry-run"]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


# ----------------------------------------------------------------------------------------------- errors
def test_ids() -> None:
    assert all(map(is_id, ("org/name", "a.b-c/d_e.f@main", "org/name@refs/pr/1", "org/name@v1.0")))
    wrong = (
        "name",
        "a/b/c",
        "./a",
        "../a",
        "a/..",
        "/a",
        "a/",
        "org/name@",
        "org/name@../x",
        "org/na me",
        "org/-x",
        "ö/x",
    )
    assert not any(map(is_id, wrong))


def test_a_folder_comes_first(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(NAME).remote is None
    assert hub.requests == []


def test_repositories_that_cannot_be_had(hub: Hub, folder: Path, tmp_path: Path) -> None:
    def slices(name: str) -> Result:
        return matexport("slices", "-m", name)

    fails(slices("org/nothing"), 4, "org/nothing: is neither a folder here nor a repository", "hf auth login")
    fails(slices(f"{NAME}@nothing"), 4, f"{NAME}@nothing: has no such revision")
    fails(slices("org/a--b"), 4, "is no name of a repository")
    hub.repositories[NAME].gated = True
    fails(slices(NAME), 5, f"{NAME}: is gated", "hf auth login", "HF_TOKEN")
    fails(matexport("verify", "-m", folder, "--source", NAME), 5, "is gated")


def test_a_token_opens_what_is_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert matexport("slices", "-m", NAME).code == 0


def test_repositories_without_safetensors(hub: Hub, folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "pickled"
    path.mkdir()
    hub.publish("org/other", path)
    fails(matexport("slices", "-m", "org/other"), 4, "config.json")
    config = vision_config()
    (path / "config.json").write_text(json.dumps(config))
    hub.repositories["org/other"].commit(path)
    fails(matexport("slices", "-m", "org/other"), 4, "org/other: has no model.safetensors")
    state = {name: torch.from_numpy(array) for name, array in vision_tensors(config).items()}
    torch.save(state, path / "pytorch_model.bin")
    hub.repositories["org/other"].commit(path)
    hub.requests.clear()
    fails(matexport("slices", "-m", "org/other"), 4, "org/other: holds only pickled weights", "--allow-pickle")
    assert hub.weights() == []
    result = matexport("slice", "-m", "org/other", "--allow-pickle", "-o", tmp_path / "out", "--stream")
    assert result.code == 0, result
    assert matexport("slice", "-m", path, "--allow-pickle", "-o", tmp_path / "local").code == 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_names_in_a_hostile_index(hub: Hub, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.mkdir()
    (path / "config.json").write_text("{}")
    hub.publish("org/hostile", path)
    for shard in ("../../evil.safetensors", "/etc/passwd", "a/b.safetensors", "*.safetensors"):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        hub.repositories["org/hostile"].commit(path)
        fails(matexport("slices", "-m", "org/hostile"), 4, "is not the name of a shard")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    hub.repositories["org/hostile"].commit(path)
    fails(matexport("slices", "-m", "org/hostile"), 4, "has no absent.safetensors")


def spoiled(**changes: Any) -> Fault:
    """A server that answers ranges of weight files otherwise; `times` (all) of them."""
    times = changes.pop("times", 10**9)

    def fault(request: Request, answer: Answer) -> None:
        nonlocal times
        if request.path.startswith("/cdn/") and request.range and times > 0:
            times -= 1
            for name, value in changes.items():
                setattr(answer, name, value(answer) if callable(value) else value)

    return fault


IGNORED = {"status": 200, "headers": lambda a: {k: v for k, v in a.headers.items() if k != "Content-Range"}}
CUT = {"body": lambda answer: answer.body[:-1]}
SHORT = {**CUT, "length": lambda answer: answer.length - 1}
BUSY = {"status": 503, "body": b"", "length": 0}
OTHER_RANGE = {
    "headers": lambda a: {**a.headers, "Content-Range": a.headers["Content-Range"].replace("bytes ", "bytes 1")}
}
GARBAGE = {"body": lambda answer: b"\xff" * len(answer.body)}
FAULTS = {
    "no ranges": (IGNORED, 4, "does not serve byte ranges: 200"),
    "another range": (OTHER_RANGE, 4, "does not serve byte ranges: 206"),
    "beyond the end": ({"status": 416, "body": b"", "length": 0}, 4, "the Hub answers 416"),
    "cut off": (CUT, 5, "the Hub cannot be reached (RemoteProtocolError)"),
    "short": (SHORT, 5, "the Hub cannot be reached (ConnectionError)"),
    "busy": (BUSY, 5, "the Hub answers 503"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_refused(hub: Hub, folder: Path, tmp_path: Path, fault: str) -> None:
    changes, code, message = FAULTS[fault]
    hub.fault = spoiled(**changes)
    fails(matexport("slices", "-m", NAME), code, message, f"{NAME}@{hub.repositories[NAME].branches['main']}/")
    hub.fault = lambda request, answer: None
    planned = mx.plan(NAME, "half")
    hub.fault = spoiled(**changes)
    with pytest.raises((CheckpointError, MissingError)) as caught:
        planned.write(tmp_path / "out", stream=True)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_garbage_instead_of_a_header(hub: Hub) -> None:
    hub.fault = spoiled(**GARBAGE)
    fails(matexport("slices", "-m", NAME), 4, "does not fit a file of")


@pytest.mark.parametrize("changes", [CUT, SHORT, BUSY], ids=["cut off", "short", "busy"])
def test_failures_that_pass_are_not_seen(hub: Hub, folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    planned = mx.plan(NAME, "half")
    hub.fault = spoiled(**changes, times=4)
    planned.write(tmp_path / "out", stream=True)
    mx.slice(folder, "half", tmp_path / "local")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_download_that_breaks_off(hub: Hub, tmp_path: Path) -> None:
    def fault(request: Request, answer: Answer) -> None:
        if request.path.startswith("/cdn/") and answer.length > 10_000:
            answer.body = b""

    hub.fault = fault
    fails(matexport("slice", "-m", NAME, "-s", "half", "-o", tmp_path / "out"), 5, "the Hub cannot be reached")
    assert not (tmp_path / "out").exists()
    hub.fault = lambda request, answer: None
    assert matexport("slice", "-m", NAME, "-s", "half", "-o", tmp_path / "out").code == 0


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails(matexport("slices", "-m", NAME), 5, "the Hub cannot be reached (ConnectError)", "HF_ENDPOINT")


def test_a_repository_that_lost_a_file(hub: Hub, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    hub.publish(NAME, tmp_path / "copy")
    repository = open_repository(NAME)
    assert repository == Repository(NAME, hub.repositories[NAME].branches["main"], repository.folder)
    with pytest.raises(CheckpointError, match=r"has no absent\.safetensors"):
        repository.fetch(["absent.safetensors"])
    with pytest.raises(CheckpointError, match="is not in the repository"):
        repository.open("absent.safetensors", 10).read_into(memoryview(bytearray(2)), 0)
