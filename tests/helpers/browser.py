"""One headless Chromium for a test session, and a server for what it loads; `make web` installs the packages."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import REPOSITORY

MODULES = REPOSITORY / "build" / "web" / "node_modules"
PAGE = REPOSITORY / "tests" / "web" / "page.html"


def missing() -> str:
    """What is not there for these tests; empty if all is."""
    if chromium() is None:
        return "Chromium is not installed: apt-get install chromium"
    if shutil.which("node") is None:
        return "Node.js is not installed: apt-get install nodejs npm"
    if not (MODULES / "playwright-core").is_dir():
        return f"{MODULES.relative_to(REPOSITORY)} is not installed: make web"
    return ""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Browser:
    """Calls functions of tests/web/page.html.

    Attributes:
        root: what stands in this folder is served as /models/...
    """

    root: Path
    address: str
    process: subprocess.Popen[str]

    def call(self, name: str, **job: Any) -> Any:
        """Calls `window[name](job)` and returns what it gives. Raises RuntimeError with what the page said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"url": f"{self.address}/page.html", "name": name, "job": job}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the browser has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


class Handler(http.server.SimpleHTTPRequestHandler):
    """/page.html, /npm/ (the packages) and /models/ (a folder of the session)."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def translate_path(self, path: str) -> str:
        if path == "/page.html":
            return str(PAGE)
        if path.startswith("/npm/"):
            self.directory = str(MODULES)
            return super().translate_path(path.removeprefix("/npm"))
        self.directory = str(self.server.models)  # type: ignore[attr-defined]
        return super().translate_path(path.removeprefix("/models"))

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def browser(root: Path) -> Iterator[Browser]:
    """A server and a browser, until the block ends; `root` is a new folder."""
    models, profile = root / "models", root / "profile"
    models.mkdir()
    profile.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(models)))
    server.models = models  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = REPOSITORY / "tests" / "web" / "browser.mjs"
    command = ["node", str(script), str(MODULES), str(chromium()), str(profile)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Browser(models, f"http://127.0.0.1:{server.server_port}", process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        server.shutdown()
        server.server_close()
