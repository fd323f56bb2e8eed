"""A cluster that lets anyone in is noticed."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from fusellm_ray.exposure import is_open


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Lists no jobs, to anyone; with `needs_token` to nobody."""

    needs_token = False

    def do_GET(self) -> None:  # http.server's name
        self.send_response(401 if self.needs_token else 200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[False, True])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    handler = type("Handler", (Dashboard,), {"needs_token": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", request.param
        server.shutdown()


def test_a_dashboard_is_open_where_it_answers_without_a_token(dashboard: tuple[str, bool]):
    address, needs_token = dashboard
    assert is_open(f"http://{address}") is not needs_token


def test_a_dashboard_that_cannot_be_reached_is_not_called_open():
    assert not is_open("http://127.0.0.1:9")


def test_what_answers_and_is_no_dashboard_is_not_called_open():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"no HTTP\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert not is_open(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_cluster_that_asks_for_no_token_is_warned_of():
    code = "from fusellm_ray.exposure import warn_of_open_cluster; print(warn_of_open_cluster(''))"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "no authentication" in result.stdout
