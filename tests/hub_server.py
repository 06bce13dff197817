"""A hub of one's own: the few endpoints of the Hugging Face hub that fetching a snapshot needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name, and what was asked for.

    Attributes:
        files: ``owner/name`` to revision to file name to content; every revision is its own commit.
        refs: ``owner/name`` to branch or tag to commit.
        sizes: File name to the size that the hub claims, where that is not the true one.
        requests: Method and path of every request, in order.
    """

    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, repo: str, revision: str, files: Mapping[str, bytes]) -> str:
        """Makes a commit of these files, points the revision at it and returns its hash."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(repo.encode() + content).hexdigest()
        self.files.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[revision] = commit
        return commit


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serves a hub on the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._refuse("EntryNotFound")

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.files:
            self._refuse("RepoNotFound")
            return None
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.files[repo]:
            self._refuse("RevisionNotFound")
            return None
        return commit, self.hub.files[repo][commit]

    def _info(self, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            commit, files = found
            siblings = [
                {
                    "rfilename": name,
                    "size": self.hub.sizes.get(name, len(data)),
                    "blobId": _blob(data),
                }
                for name, data in files.items()
            ]
            self._send(_json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}))

    def _tree(self, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            self._send(
                _json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                        for name, data in found[1].items()
                    ]
                )
            )

    def _file(self, repo: str, revision: str, name: str) -> None:
        if found := self._find(repo, revision):
            commit, files = found
            if name not in files:
                self._refuse("EntryNotFound")
                return
            self._send(files[name], {"ETag": f'"{_blob(files[name])}"', "X-Repo-Commit": commit})

    def _send(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
