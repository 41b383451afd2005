"""A hub on 127.0.0.1: the few endpoints of the Hugging Face hub that a push uses, and what each request said."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_TheSecretOfThisTest0123456789"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """Repositories by name and whether they are private; files of the commits; refusals by path, each a status."""

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    creations: list[dict[str, Any]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of a request."""
        if path in self.refusals:
            return self.refusals[path], {"error": f"the token {TOKEN} may not do this"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path == f"/api/models/{name}" and name in self.repositories:
            return 200, {"id": name, "sha": COMMIT, "private": self.repositories[name], "siblings": []}
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(item) for item in json.loads(body)["objects"]]}
        if path.startswith("/objects/") and method == "PUT":
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            return self._commit(name, body)
        return 404, {"error": f"{method} {path} is not part of this hub"}

    def _create(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.creations.append(request)
        name = f"{request['organization']}/{request['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = request.get("visibility") == "private"
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _object(self, item: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/objects/{item['oid']}", "header": {}}
        return {"oid": item["oid"], "size": item["size"], "actions": {"upload": upload}}

    def _commit(self, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                stored = self.objects[value["oid"]]
                assert hashlib.sha256(stored).hexdigest() == value["oid"]
                self.files[value["path"]] = stored
        return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Serve a hub without repositories until the block ends."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append((self.command, path))
            hub.tokens.append(self.headers.get("Authorization"))
            status, value = hub.answer(self.command, path, body)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400 and status != 409:
                self.send_header("X-Error-Message", value["error"])
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: what was asked is kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
