"""The Hub's HTTP interface on a loopback port, as far as huggingface_hub asks for it: models, files, commits, LFS.

A real server and real bytes. `Hub.refuses` and `Hub.damages` let it answer as a hub does that says no or stores wrong.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 1024  # bytes; larger files, and all GGUF files, go through LFS


class Hub:
    """`models[repo][path]` is a file's bytes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "GET /api/models/me/model"
        self.private: dict[str, bool] = {}
        self.refuses = 0  # HTTP status of every answer to a write
        self.damages = False  # store another byte than was sent

    def add(self, repo: str, folder: Path) -> None:
        """A repository with a folder's files."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.models[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def commit(self, repo: str) -> str:
        """The id of a repository's one commit, which follows from its files."""
        lines = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.models[repo].items())]
        return hashlib.sha1("\n".join(lines).encode()).hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which huggingface_hub talks to this hub and to no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # its storage is another service
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_of_a_test",
            "NO_PROXY": "127.0.0.1",
        }


def _is_lfs(name: str, size: int) -> bool:
    return name.endswith((".gguf", ".safetensors")) or size > LFS_FROM


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            if self.command in ("POST", "PUT") and hub.refuses:
                return self._json({"error": "the hub says no"}, hub.refuses)
            if self.command == "PUT" and path.startswith("/lfs/"):
                hub.objects[path.removeprefix("/lfs/")] = body[:-1] + b"?" if hub.damages else body
                return self._send(b"")
            if path == "/api/repos/create":
                wanted = json.loads(body)
                repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
                there = repo in hub.models
                hub.models.setdefault(repo, {})
                hub.private.setdefault(repo, wanted.get("visibility") == "private" or bool(wanted.get("private")))
                return self._json({"url": f"{hub.url}/{repo}", "id": repo}, 409 if there else 200)
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            for pattern, work in ROUTES:
                if found := re.fullmatch(pattern, path):
                    if found["repo"] not in hub.models:
                        return self._json({"error": "Repository not found"}, 404, code="RepoNotFound")
                    return work(self, body, **found.groupdict())
            return self._json({"error": "not found"}, 404)

        def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
            if revision not in (None, "main", hub.commit(repo)):
                return self._json({"error": "no such revision"}, 404, code="RevisionNotFound")
            siblings = []
            for name, data in sorted(hub.models[repo].items()):
                entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                if _is_lfs(name, len(data)):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            self._json({"id": repo, "modelId": repo, "sha": hub.commit(repo), "siblings": siblings, "private": False})

        def tree(self, body: bytes, repo: str, revision: str) -> None:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(hub.models[repo].items())
            ]
            self._json(files)

        def preupload(self, body: bytes, repo: str, revision: str) -> None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_lfs(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})

        def batch(self, body: bytes, repo: str) -> None:
            objects = [
                {
                    "oid": wanted["oid"],
                    "size": wanted["size"],
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}},
                }
                for wanted in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

        def store(self, body: bytes, repo: str, revision: str) -> None:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.models[repo][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.models[repo][value["path"]] = hub.objects[value["oid"]]
            commit = hub.commit(repo)
            self._json({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}"})

        def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
            data = hub.models[repo].get(name)
            if data is None:
                return self._json({"error": "Entry not found"}, 404, code="EntryNotFound")
            etag = hashlib.sha256(data).hexdigest()
            self._send(data, **{"X-Repo-Commit": hub.commit(repo), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

        def _json(self, value: Any, status: int = 200, code: str = "") -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": str(value.get("error"))} if code else {}
            self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

        def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Nothing on the screen."""

    model, revision = r"/api/models/(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
    ROUTES = [
        (model, Handler.info),
        (rf"{model}/revision/{revision}", Handler.info),
        (rf"{model}/tree/{revision}", Handler.tree),
        (rf"{model}/preupload/{revision}", Handler.preupload),
        (rf"{model}/commit/{revision}", Handler.store),
        (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
        (rf"/(?P<repo>[^/]+/[^/]+)/resolve/{revision}/(?P<name>.+)", Handler.resolve),
    ]
    return Handler


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub that is empty."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
