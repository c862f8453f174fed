"""A stand-in of the Hub on 127.0.0.1: as much of its API as creating a repository and uploading a folder take."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import yaml


@dataclass
class HubState:
    """What the stand-in has seen and holds."""

    token: str | None = None  # refuse every other one
    read_only: bool = False  # whether the token may only read
    refuse_commits: int = 0  # answer this many commits with a server error
    drop_blobs: int = 0  # hang up on this many uploads of a large file
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # name -> path -> content
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files by sha256, before their commit
    cards: list[str] = field(default_factory=list)  # model cards that were sent for validation


def card_errors(content: str) -> list[str]:
    """What the Hub refuses of a model card's metadata: fields of the wrong kind, values that it does not know."""
    data = yaml.safe_load(content.split("---")[1])
    checks = {
        "license": data["license"] in ("other", "apache-2.0", "mit"),
        "license_name": ("license_name" in data) == (data["license"] == "other"),
        "license_link": re.fullmatch(r"LICENSE(\.md)?|https://\S+", data.get("license_link", "LICENSE")),
        "pipeline_tag": data["pipeline_tag"] in ("text-to-image", "image-to-image"),
        "base_model": re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.get("base_model", "a/b")),
        "tags": all(isinstance(tag, str) for tag in data["tags"]),
        "widget": all(isinstance(entry["text"], str) and "url" in entry.get("output", {}) for entry in data["widget"]),
    }
    return [f'"{field}" is not valid' for field, valid in checks.items() if not valid]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *_: Any) -> None:
        pass

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        headers = {"Content_Type": "application/json", "Content_Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        body, path = self.read_body(), self.path.split("?")[0]
        authorization = self.headers.get("Authorization")
        self.state.requests.append((self.command, path, authorization))
        if self.state.token and path.startswith("/api/") and authorization != f"Bearer {self.state.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, method in self.ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return getattr(self, method)(body, *match.groups())
        self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    ROUTES: ClassVar = {
        r"/api/repos/create": "create_repository",
        r"/api/validate-yaml": "validate_card",
        r"/api/models/([^/]+/[^/]+)/preupload/main": "plan_upload",
        r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": "offer_blobs",
        r"/blobs/(\w+)": "take_blob",
        r"/api/models/([^/]+/[^/]+)/commit/main": "commit",
    }

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[index]

    def create_repository(self, body: bytes) -> None:
        if self.state.read_only:
            return self.answer({"error": "no write access"}, 403)
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        self.state.repositories.setdefault(name, {})
        self.answer({"url": f"{self.address}/{name}", "name": name, "id": "1"})

    def validate_card(self, body: bytes) -> None:
        self.state.cards.append(json.loads(body)["content"])
        errors = [{"message": message} for message in card_errors(self.state.cards[-1])]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def plan_upload(self, body: bytes, _: str) -> None:
        plans = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            plans.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.answer({"files": plans})

    def offer_blobs(self, body: bytes, _: str) -> None:
        objects = []
        for blob in json.loads(body)["objects"]:
            objects.append({**blob, "actions": {"upload": {"href": f"{self.address}/blobs/{blob['oid']}"}}})
        self.answer({"transfer": "basic", "objects": objects})

    def take_blob(self, body: bytes, oid: str) -> None:
        if self.state.drop_blobs > 0:
            self.state.drop_blobs -= 1
            self.close_connection = True
            return self.connection.close()
        self.state.blobs[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def commit(self, body: bytes, name: str) -> None:
        if self.state.refuse_commits > 0:
            self.state.refuse_commits -= 1
            return self.answer({"error": "out of order"}, 500)
        files = self.state.repositories[name]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.state.blobs[line["value"]["oid"]]
        self.answer({"success": True, "commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


def serve(state: HubState) -> ThreadingHTTPServer:
    """Serve `state` on a free port of 127.0.0.1, in a thread, until `shutdown` and `server_close`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"state": state}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
