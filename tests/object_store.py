"""An object store in this process, reached as `gs://`: by etils.epath through fsspec, and by
TensorStore through a server that speaks what it asks of Google's JSON API.

There is no rename, no lock, no append and no directory without an object in it: what tries one of
them raises. An object appears when it is complete.
"""

import contextlib
import io
import json
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

from fsspec.spec import AbstractFileSystem

OBJECTS: dict[str, tuple[bytes, int]] = {}  # "bucket/name" -> content, generation
LOCK = threading.Lock()


def put(name: str, content: bytes) -> int:
    with LOCK:
        generation = 1 + max((number for _, number in OBJECTS.values()), default=0)
        OBJECTS[name] = bytes(content), generation
        return generation


class Upload(io.BytesIO):
    """A file that is put when it is closed."""

    def __init__(self, name: str):
        super().__init__()
        self.object_name = name

    def close(self) -> None:
        if not self.closed:
            put(self.object_name, self.getvalue())
        super().close()


class Store(AbstractFileSystem):
    protocol, cachable = ("gcs", "gs"), False

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        if mode == "rb":
            if path not in OBJECTS:
                raise FileNotFoundError(path)
            return io.BytesIO(OBJECTS[path][0])
        assert mode == "wb", f"an object store has no {mode}"
        return Upload(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        below = path + "/"
        entries = {}
        with LOCK:
            names = {name: len(content) for name, (content, _) in OBJECTS.items()}
        for name, size in names.items():
            if name == path:
                entries[name] = dict(name=name, size=size, type="file")
            elif name.startswith(below):
                first, slash, _ = name.removeprefix(below).partition("/")
                kind = dict(size=0, type="directory") if slash else dict(size=size, type="file")
                entries[below + first] = dict(name=below + first) | kind
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def info(self, path, **_):
        path = self._strip_protocol(path)
        if path in OBJECTS:
            return dict(name=path, size=len(OBJECTS[path][0]), type="file")
        self.ls(path)
        return dict(name=path, size=0, type="directory")

    def _rm(self, path):
        with LOCK:
            OBJECTS.pop(self._strip_protocol(path), None)  # folders are nothing by themselves

    def mkdir(self, path, *_, **__):
        """Nothing: a folder is there with its first object."""

    makedirs = rmdir = mkdir

    def mv(self, *_, **__):
        raise AssertionError("an object store has no rename")

    rename = move = mv


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def parts(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        _, _, rest = url.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        name = urllib.parse.unquote(name.removeprefix("/"))
        return f"{bucket}/{name}", dict(urllib.parse.parse_qsl(url.query))

    def answer(self, status: int, content: bytes = b"", **headers) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        name, query = self.parts()
        if name.endswith("/") and "alt" not in query:
            return self.list(name, query)
        if name not in OBJECTS:
            return self.answer(404)
        content, generation = OBJECTS[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        headers = dict(x_goog_generation=generation)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, content[start:stop], **headers)
        return self.answer(200, content, **headers)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        prefix = bucket + query.get("prefix", "")
        names = sorted(name.removeprefix(bucket) for name in OBJECTS if name.startswith(prefix))
        first, last = query.get("startOffset", ""), query.get("endOffset", "")
        names = [name for name in names if name >= first and (not last or name < last)]
        items = [{"name": name, "size": str(len(OBJECTS[bucket + name][0]))} for name in names]
        self.answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")

    def do_POST(self):
        bucket, query = self.parts()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = bucket + query["name"]
        held = OBJECTS.get(name, (b"", 0))[1]
        if query.get("ifGenerationMatch", str(held)) != str(held):
            return self.answer(412)
        reply = {"name": query["name"], "generation": str(put(name, content)), "size": "0"}
        self.answer(200, json.dumps(reply).encode(), Content_Type="application/json")

    def do_DELETE(self):
        name, _ = self.parts()
        with LOCK:
            found = OBJECTS.pop(name, None)
        self.answer(204 if found else 404)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """The URL of a bucket, empty."""
    OBJECTS.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "EPATH_USE_TF": "false",
    }
    # What Orbax asks of Google's client before it deletes a step: whether folders are objects.
    flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    client = types.ModuleType("google.cloud.storage")
    client.Client = lambda: types.SimpleNamespace(get_bucket=lambda _: flat)
    with (
        mock.patch.dict("os.environ", environment),
        mock.patch.dict("sys.modules", {"google.cloud.storage": client}),
        mock.patch.dict(sys.modules["fsspec.registry"]._registry, {"gcs": Store, "gs": Store}),
    ):
        try:
            yield "gs://bucket"
        finally:
            server.shutdown()
            server.server_close()
            thread.join(10)
