"""A hub on this machine, as far as uploads and downloads need one: repositories in memory, tokens, and the ways in which it fails."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

GOOD, READER = "hf_good", "hf_reader"  # tokens: one may write, one may not
_LARGE = ".safetensors"


@dataclass
class Repository:
    """What a repository holds: path -> bytes; the files of its only commit that counts, the newest."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class FakeHub:
    """The server; use as a context. `url` is what HF_ENDPOINT is set to.

    Attributes:
        repositories: "user/name" -> what it holds.
        stored: SHA-256 -> bytes of large files that arrived, committed or not.
        requests: "METHOD path" of every request.
        cut: How many uploads of large files are still broken off in the middle.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, call: Callable[[list[str]], None]) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        call(path.strip("/").split("/"))

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refused(self, *, writes: bool) -> bool:
        """Answer a token that is not known (401) or may not write (403), as the hub does."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (GOOD, READER):
            self._json({"error": "Invalid username or password."}, 401)
        elif writes and token == READER:
            self._json({"error": "Forbidden: you don't have the rights to create a model"}, 403)
        else:
            return False
        return True

    def _get(self, parts: list[str]) -> None:
        if parts[:2] != ["api", "models"] or self._refused(writes=False):
            return self._json({"error": "no such page"}, 404) if parts[:2] != ["api", "models"] else None
        name = "/".join(parts[2:4])
        if (repository := self.hub.repositories.get(name)) is None:
            return self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        siblings = [_sibling(path, data) for path, data in repository.files.items()]
        sha = repository.commits[-1] if repository.commits else "0" * 40
        return self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def _post(self, parts: list[str]) -> None:
        body = self._body()
        if self._refused(writes=True):
            return None
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(name, Repository(private))
            return self._json({"url": f"{self.hub.url}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._batch(json.loads(body))
        repository = self.hub.repositories["/".join(parts[2:4])]
        if parts[4] == "preupload":
            wanted = [f["path"] for f in json.loads(body)["files"]]
            modes = [
                {"path": p, "uploadMode": "lfs" if p.endswith(_LARGE) else "regular", "shouldIgnore": False}
                for p in wanted
            ]
            return self._json({"files": modes})
        return self._commit(repository, parts, body)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
            here = wanted["oid"] in self.hub.stored
            objects.append({**wanted, **({} if here else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, parts: list[str]) -> None:
        if self.hub.cut:
            self.hub.cut -= 1
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return None
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == parts[-1]
        self.hub.stored[parts[-1]] = data
        return self._json({})

    def _commit(self, repository: Repository, parts: list[str], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        commit = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        repository.commits.append(commit)
        url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if path.endswith(_LARGE):
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found
