"""A stand-in for the Hugging Face hub on loopback: as much of it as reading data sets and buckets takes.

It answers what huggingface_hub 2.3 and datasets 5.2 ask, as the hub does but for xet: large files are redirected to
another host, which takes no token, as the hub's storage.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Serves until the process ends. Repositories are ``datasets/OWNER/NAME`` and ``buckets/OWNER/NAME``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # by repository, by path
        self.gated: set[str] = set()  # repositories that want the token
        self.requests: list[str] = []  # method, path and range of each
        self.faults: list[tuple[str, int, int | str]] = []  # (pattern, number of requests, status or "cut" or "gone")
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def fault(self, request: str) -> int | str:
        for number, (pattern, left, fault) in enumerate(self.faults):
            if left and re.search(pattern, request):
                self.faults[number] = pattern, left - 1, fault
                return fault
        return ""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        fault = self.server.fault(self.server.requests[-1])
        self.is_cut = fault == "cut"
        if fault == "gone":
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, b"", {"Retry-After": "7"} if fault == 429 else {})
        else:
            match path.strip("/").split("/"):
                case ["storage", digest]:
                    self.stored(digest)
                case ["api", "datasets" | "buckets" as kind, owner, name, *rest]:
                    self.describe(f"{kind}/{owner}/{name}", rest, "true" in parse_qs(url.query).get("recursive", ()))
                case ["datasets", owner, name, "resolve", revision, *parts]:
                    self.resolve(f"datasets/{owner}/{name}", "/".join(parts), revision)
                case ["buckets", owner, name, "resolve", *parts]:
                    self.resolve(f"buckets/{owner}/{name}", "/".join(parts))
                case _:
                    self.refuse(404, "NotFound")

    do_HEAD = do_GET  # noqa: N815

    def describe(self, repo: str, rest: list[str], recursive: bool) -> None:
        files = self.server.files.get(repo)
        if files is None:
            self.refuse(404, "RepoNotFound")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", self.server.commit(repo)):
            self.refuse(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            below = "/".join(rest[2 if repo.startswith("datasets/") else 1 :])
            found = list(_tree(files, f"{below}/" if below else "", recursive))
            self.answer(200, json.dumps(found).encode()) if found else self.refuse(404, "EntryNotFound")
        else:
            info = {"id": repo.partition("/")[2], "sha": self.server.commit(repo), "private": False}
            size = {"createdAt": "2026-11-30T00:00:00.000Z", "size": 0, "totalFiles": len(files)}
            self.answer(200, json.dumps(info | size).encode())

    def resolve(self, repo: str, path: str, revision: str = "main") -> None:
        files, token = self.server.files.get(repo), self.headers.get("Authorization")
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if repo in self.server.gated and token != f"Bearer {TOKEN}":
            return self.refuse(403 if token else 401, "GatedRepo")
        commit = self.server.commit(repo)
        if revision not in ("main", commit):
            return self.refuse(404, "RevisionNotFound")
        if path not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        digest, size = _digest(files[path]), len(files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if path.endswith((".md", ".json")):
            return self.answer(200, files[path], headers)
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": f"{size}"}
        where = f"http://localhost:{self.server.server_port}/storage/{digest}"
        return self.answer(302, b"", headers | linked | {"Location": where})

    def stored(self, digest: str) -> None:
        if "Authorization" in self.headers:
            return self.refuse(400, "InvalidArgument")
        content = next(c for files in self.server.files.values() for c in files.values() if _digest(c) == digest)
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(200, content)
        part = content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        place = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}"
        return self.answer(206, part, {"Content-Range": place})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, b"", {"X-Error-Code": code} | (headers or {}))

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": f"{len(body)}"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.is_cut else body)
        self.close_connection |= self.is_cut

    def log_message(self, *_: Any) -> None: ...


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    folders = {}
    for path, content in files.items():
        first, *deeper = path.removeprefix(below).split("/") if path.startswith(below) else ("",)
        if first and (recursive or not deeper):
            yield {"type": "file", "path": path, "size": len(content), "oid": _digest(content), "xetHash": None}
        elif first:
            folders[below + first] = {"type": "directory", "path": below + first, "oid": "0" * 40}
    yield from folders.values()


HUB = Hub()
