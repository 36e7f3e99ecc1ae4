"""As much of the Hugging Face hub as uploading a model, loading and downloading it needs, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40
Repositories = dict[str, dict[str, bytes]]  # by name, their files by path


@contextmanager
def local_hub() -> Iterator[tuple[str, Repositories]]:
    """The address of a hub that is there inside the block, and what has been uploaded to it."""
    repositories: Repositories = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlsplit(self.path).path
            repository = "/".join(path.split("/")[3:5])
            if path == "/api/repos/create":
                asked = json.loads(body)
                repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
                repositories.setdefault(repository, {})
                self.answer({"url": f"{address}/{repository}", "name": repository})
            elif "/preupload/" in path:
                files = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            elif "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repositories[repository][line["value"]["path"]] = content
                url = f"{address}/{repository}/commit/{COMMIT}"
                self.answer({"commitUrl": url, "commitOid": COMMIT})
            elif path == "/api/validate-yaml":  # of a model card
                self.answer({"warnings": [], "errors": []})
            else:
                self.missing()

        def do_GET(self) -> None:
            _, owner, name, *rest = unquote(urlsplit(self.path).path).split("/")
            if (owner, name) == ("api", "models"):
                repository = "/".join(rest[:2])
                files = repositories.get(repository, {})
                tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": COMMIT} for path in files]
                names = [{"rfilename": path} for path in files]
                self.answer(tree if "tree" in rest else {"id": repository, "sha": COMMIT, "siblings": names})
                return
            found = repositories.get(f"{owner}/{name}", {}).get("/".join(rest[2:])) if rest[:1] == ["resolve"] else None
            if found is None:
                self.missing()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(found).hexdigest()}"')
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(found)

        do_HEAD = do_GET  # noqa: N815

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def missing(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield address, repositories
        finally:
            server.shutdown()
            thread.join()
