"""A stand-in for the Hugging Face hub on the loopback address, from a folder that holds <owner>/<name>/<files>.

A name is that of a data set or of a model: the address alone says which.
"""

import hashlib
import http.server
import json
import re
import urllib.parse
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What streaming, and reading a model, use of the hub's HTTP interface: metadata, lists of files, ranges of a file.

    Set `root` to the folder; `asked` collects (method, path, range) of every request.
    """

    root: Path
    asked: list[tuple[str, str, str]] = []

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers.get("Range", "")))
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(self.root / found[1] / found[2])
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = self.files(found[1])
            about = {"id": found[1], "sha": COMMIT, "private": False, "gated": False, "disabled": False}
            self.send_json(about | {"siblings": [{"rfilename": f} for f in files]}, bool(files))
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            home, folder = self.root / found[1], self.root / found[1] / found[2]
            inside = sorted(folder.rglob("*") if "recursive=true" in self.path.lower() else folder.glob("*"))
            self.send_json([self.about(found[1], str(p.relative_to(home))) for p in inside], bool(inside))
        else:
            self.send_json(None, False)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", urllib.parse.unquote(self.path))
        paths = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
        files = self.files(found[1]) if found else []
        self.send_json([self.about(found[1], path) for path in paths if path in files], bool(found))

    def files(self, id: str) -> list[str]:
        return sorted(str(p.relative_to(self.root / id)) for p in (self.root / id).rglob("*") if p.is_file())

    def about(self, id: str, file: str) -> dict:
        if (self.root / id / file).is_dir():
            return {"type": "directory", "path": file, "oid": hashlib.sha1(file.encode()).hexdigest()}
        content = (self.root / id / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_json(self, value: object, good: bool) -> None:
        if good:
            self.send(200, json.dumps(value).encode(), {})
        else:
            self.send(404, json.dumps({"error": "not found"}).encode(), {"X-Error-Code": "EntryNotFound"})

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            return self.send_json(None, False)
        content, status = path.read_bytes(), 200
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": tag, "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.send(status, content, headers)

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
