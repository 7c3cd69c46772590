"""An S3 server on loopback that is slow, refuses every k-th request and cuts every k-th answer short."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest


@dataclass
class Faults:
    """What goes wrong, of the requests for objects; the rest only takes its time. 0: never."""

    latency_seconds: float = 0.0
    refuse_every: int = 0
    cut_every: int = 0
    num_refused: int = 0
    num_cut: int = 0
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> int:
        with self._lock:
            self._count += 1
            return self._count


class FaultyApp:
    """WSGI, around that of moto."""

    def __init__(self, app: Any, faults: Faults) -> None:
        self._app, self._faults = app, faults

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        faults = self._faults
        time.sleep(faults.latency_seconds)
        if environ["REQUEST_METHOD"] != "GET" or not environ["PATH_INFO"].endswith(".tar"):
            return self._app(environ, start_response)
        number = faults.next()
        if faults.refuse_every and number % faults.refuse_every == 0:
            faults.num_refused += 1
            start_response("503 Service Unavailable", [("Content-Type", "text/xml"), ("Content-Length", "0")])
            return []
        body = b"".join(self._app(environ, start_response))
        if faults.cut_every and number % faults.cut_every == 0:
            faults.num_cut += 1
            return [body[: len(body) // 2]]  # of a Content-Length of all
        return [body]


@contextlib.contextmanager
def serve(faults: Faults) -> Iterator[str]:
    """The server's address, while it runs. Objects are those of every moto server in this process."""
    app = pytest.importorskip(
        "moto.moto_server.werkzeug_app", reason="moto is not installed: pip install 'moto[server]'"
    )
    serving = pytest.importorskip("werkzeug.serving")
    wrapped = FaultyApp(app.DomainDispatcherApplication(app.create_backend_app), faults)
    server = serving.make_server("127.0.0.1", 0, wrapped, threaded=True, request_handler=app.MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def s3_behind(url: str) -> Iterator[None]:
    """`s3://` is the server at ``url``; s3fs keeps a connection for each."""
    with pytest.MonkeyPatch.context() as patch:
        options = {
            "endpoint_url": url,
            "key": "testing",
            "secret": "testing",
        }
        patch.setitem(fsspec.config.conf, "s3", options)
        yield
