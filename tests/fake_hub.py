"""A stand-in for the Hugging Face hub on loopback, with as much of its protocol as its client needs here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Hub:
    """Repositories by their name: files by theirs. `commit` is the name of whatever is there by now."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.url = ""
        self.asked: list[str] = []
        self.token = "hf_test"

    def commit(self, repo: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, content: Any, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            state.asked.append(f"{self.command} {path}")
            owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
            repo = f"{owner}/{name}"
            files = state.repos.get(repo)
            if files is None:
                self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                kinds = {"type": "file", "oid": "0" * 40}
                self.reply([{**kinds, "path": file, "size": len(data)} for file, data in files.items()])
            elif path.startswith("/api/"):
                siblings = [{"rfilename": file} for file in files]
                known = {"id": repo, "sha": state.commit(repo), "private": repo in state.private}
                self.reply(known | {"siblings": siblings})
            elif (data := files.get("/".join(rest[2:]))) is None:
                self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                digest = f'"{hashlib.sha1(data).hexdigest()}"'
                self.reply(data, ETag=digest, X_Repo_Commit=state.commit(repo))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            state.asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                self.reply({"error": "Invalid username or password."}, 401)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                if repo in state.repos:
                    url = f"{state.url}/{repo}"
                    self.reply({"error": "You already created this model repo", "url": url}, 409)
                    return
                state.repos[repo] = {}
                if asked.get("private") or asked.get("visibility") == "private":
                    state.private.add(repo)
                self.reply({"url": f"{state.url}/{repo}", "name": repo, "id": repo})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                plan = {"uploadMode": "regular", "shouldIgnore": False}
                self.reply({"files": [{"path": name, **plan} for name in names]})
            elif self.path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            else:
                repo = "/".join(self.path.split("/")[3:5])
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        value = entry["value"]
                        state.repos[repo][value["path"]] = base64.b64decode(value["content"])
                url = f"{state.url}/{repo}/commit/{state.commit(repo)}"
                self.reply({"commitUrl": url, "commitOid": state.commit(repo), "hookOutput": ""})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
