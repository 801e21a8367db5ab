"""A hub on this machine: folders of repositories, served over HTTP in the way that `huggingface_hub` asks for them.

    ROOT/models/NAMESPACE/NAME/...      ROOT/datasets/NAMESPACE/NAME/...

What it knows of the protocol: a repository's description, its list of files, and the files, each with commit and hash;
creating a repository, and uploading to it. The token "reader" may not create one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class _Hub(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        parts = unquote(address.path).strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4:
            self._describe(self.root.joinpath(*parts[1:4]), "/".join(parts[2:4]), parts[4:], parse_qs(address.query))
        elif "resolve" in parts:
            where = parts if parts[0] == "datasets" else ["models", *parts]
            self._send_file(self.root.joinpath(*where[:3]), where[5:])  # where[3:5]: resolve, and a revision
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        body = self._read().decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") == "Bearer reader" and parts[1] == "repos":
            self._refuse("", 403)
        elif parts[1] in ("repos", "validate-yaml") or parts[4:5] in (["preupload"], ["commit"]):
            self._write(parts, body)
        else:
            self._send_paths(self.root.joinpath(*parts[1:4]), parse_qs(body)["paths"])

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _write(self, parts: list[str], body: str) -> None:
        """Create a repository, or upload to it: first what is to come, then a commit with the files' content."""
        if parts[1] == "repos":
            name = json.loads(body)
            name = f"{name.get('organization') or 'me'}/{name['name']}"
            (self.root / "models" / name).mkdir(parents=True, exist_ok=True)
            found: Any = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
        elif parts[1] == "validate-yaml":
            found = {"errors": [], "warnings": []}
        elif parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.root.joinpath(*parts[1:4], line["value"]["path"])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://{self.headers['Host']}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
            found = {"commitUrl": url, "commitOid": COMMIT, "success": True}
        self._send(json.dumps(found).encode())

    def _send_paths(self, repository: Path, wanted: list[str]) -> None:
        self._send(
            json.dumps([_entry(repository, repository / p) for p in wanted if (repository / p).exists()]).encode()
        )

    def _describe(self, repository: Path, name: str, what: list[str], query: dict[str, list[str]]) -> None:
        if not repository.is_dir():
            self._refuse("RepoNotFound")
        elif what[:1] == ["tree"]:
            folder = repository.joinpath(*what[2:])
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(folder.rglob("*") if deep else folder.glob("*"))
            self._send(json.dumps([_entry(repository, path) for path in found]).encode())
        else:
            files = [{"rfilename": path.relative_to(repository).as_posix()} for path in _files(repository)]
            self._send(json.dumps({"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                                   "tags": [], "downloads": 0, "likes": 0, "siblings": files}).encode())  # fmt: skip

    def _send_file(self, repository: Path, inside: list[str]) -> None:
        path = repository.joinpath(*inside)
        if not path.is_file():
            self._refuse("EntryNotFound" if repository.is_dir() else "RepoNotFound")
            return
        body = path.read_bytes()
        self._send(body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(repository: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    body = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(body).hexdigest(), "size": len(body)}


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve; the address for HF_ENDPOINT, and what was asked for."""
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
