"""A small Hugging Face Hub on this machine: what huggingface_hub asks when it lists, downloads and reads ranges.

As the real one, it sends weight files from another origin, by way of a redirect (its other name for
this machine is the other origin), and it notes every request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WEIGHTS = (".safetensors", ".bin")


@dataclass
class Request:
    """One request, and how many bytes of body were sent for it."""

    method: str
    path: str
    range: str | None
    host: str
    token: str | None
    status: int = 0
    sent: int = 0

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass
class Repository:
    """The folder of every commit, and the commit of every branch."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, folder: Path, branch: str = "main") -> str:
        """Makes a folder the next commit of a branch. It is served as it is, later changes included."""
        sha = hashlib.sha1(f"{len(self.commits)} {folder}".encode()).hexdigest()
        self.commits[sha] = folder
        self.branches[branch] = sha
        return sha


@dataclass
class Answer:
    """An answer before it is sent; `length` is what it says, `body` what is sent of it."""

    status: int
    headers: dict[str, str]
    body: bytes
    length: int


Fault = Callable[[Request, Answer], None]  # changes an answer


class Hub(ThreadingHTTPServer):
    """The server; `fault` may spoil answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.fault: Fault = lambda request, answer: None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may hang up."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def publish(self, name: str, folder: Path) -> Repository:
        """A repository whose main branch is a folder."""
        repository = self.repositories[name] = Repository()
        repository.commit(folder)
        return repository

    def weights(self) -> list[Request]:
        """The answered requests for contents of weight files."""
        found = [r for r in self.requests if r.method == "GET" and r.file.endswith(WEIGHTS)]
        return [r for r in found if r.status in (200, 206)]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    server: Hub

    def do_GET(self) -> None:
        request = Request(
            self.command, unquote(urlsplit(self.path).path), self.headers["Range"], self.headers["Host"].split(":")[0],
            self.headers["Authorization"],
        )  # fmt: skip
        answer = self.answer(request)
        self.server.requests.append(request)
        self.server.fault(request, answer)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == "GET":
            request.sent = len(answer.body)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(answer.body)
            if len(answer.body) < answer.length:
                self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def answer(self, request: Request) -> Answer:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", request.path):
            return self.api(match[1], match[2], match[3])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            return self.file(request, match[1], match[2], match[3])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", request.path):
            return content(request, self.server.repositories[match[1]].commits[match[2]] / match[3], {})
        return error(404, "")

    def find(self, name: str, revision: str | None) -> tuple[str, Path] | Answer:
        repository = self.server.repositories.get(name)
        if repository is None:
            return error(401, "RepoNotFound")
        sha = repository.branches.get(revision or "main", revision or "main")
        if sha not in repository.commits:
            return error(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def api(self, name: str, kind: str | None, revision: str | None) -> Answer:
        found = self.find(name, revision)
        if isinstance(found, Answer):
            return found
        sha, folder = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [str(path.relative_to(folder)) for path in files]
        if kind == "tree":
            sizes = [path.stat().st_size for path in files]
            tree = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in zip(names, sizes, strict=True)]
            return answer_json(tree)
        return answer_json({"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": n} for n in names]})

    def file(self, request: Request, name: str, revision: str, path: str) -> Answer:
        found = self.find(name, revision)
        if isinstance(found, Answer):
            return found
        sha, folder = found
        if self.server.repositories[name].gated and not request.token:
            return error(401, "GatedRepo")
        headers = {"X-Repo-Commit": sha}
        if not (folder / path).is_file():
            return error(404, "EntryNotFound", headers)
        if path.endswith(WEIGHTS):
            data = (folder / path).read_bytes()
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": etag(data)}
            headers["Location"] = f"http://localhost:{self.server.port}/cdn/{name}/{sha}/{path}"
            return Answer(302, headers, b"", 0)
        return content(request, folder / path, headers)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()}"'


def content(request: Request, path: Path, headers: dict[str, str]) -> Answer:
    """A file or a range of it."""
    data = path.read_bytes()
    headers = {**headers, "ETag": etag(data), "Accept-Ranges": "bytes"}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
    if span is None:
        return Answer(200, headers, data, len(data))
    first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
    if first > last:
        return Answer(416, {**headers, "Content-Range": f"bytes */{len(data)}"}, b"", 0)
    part = data[first : last + 1]
    return Answer(206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, part, len(part))


def answer_json(value: object) -> Answer:
    data = json.dumps(value).encode()
    return Answer(200, {"Content-Type": "application/json"}, data, len(data))


def error(status: int, code: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": code}, b"", 0)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
