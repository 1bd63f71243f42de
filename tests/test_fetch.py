"""Downloads against a local server: each failure leaves the cache as it was."""

import hashlib
import http.server
import multiprocessing
import threading
import time

import pytest

from gcvit import FetchError
from gcvit import fetch as fetch_module
from gcvit.fetch import cache_folder, fetch

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "missing":
            return self.send_error(404)
        body = CONTENT
        if kind == "html":
            body = b"<html>Log in to the network</html>"
        if kind == "garbage":
            body = b"\0" * len(CONTENT)
        self.send_response(200)
        self.send_header(
            "Content-Type", "text/html" if kind == "html" else "application/octet-stream"
        )
        if kind != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "broken":
            self.wfile.write(body[: len(body) // 2])
        elif kind == "stalled":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            time.sleep(2)
        elif kind == "endless":
            try:
                for _ in range(100):
                    self.wfile.write(body)
            except OSError:
                pass
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def cached():
    return sorted(path.name for path in cache_folder("models").iterdir())


def test_fetched_once_with_a_progress_bar(server, capsys):
    for _ in range(2):
        path = fetch(f"{server.url}/good/file.bin", size=len(CONTENT), sha256=SHA256)
        assert path.read_bytes() == CONTENT
    assert server.requests == ["/good/file.bin"]
    assert cached() == ["file.bin"]
    assert "512000/512000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "Not Found"),
        ("html", "answers with a web page"),
        ("broken", "broke off after|IncompleteRead|cannot be fetched"),
        ("stalled", "timed out"),
        ("garbage", "has the hash"),
        ("endless", "sends more than"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_nothing(server, kind, message):
    size = None if kind in ("html", "missing") else len(CONTENT)
    with pytest.raises(FetchError, match=message):
        fetch(f"{server.url}/{kind}/file.bin", size=size, sha256=SHA256, timeout=1)
    assert cached() == []
    assert fetch(f"{server.url}/good/file.bin", size=len(CONTENT)).read_bytes() == CONTENT


def test_another_size_than_expected_is_refused(server):
    with pytest.raises(FetchError, match="offers 512,000 bytes; 600,000 were expected"):
        fetch(f"{server.url}/good/file.bin", size=600_000)


def test_half_a_file_in_the_cache_is_not_taken_for_a_whole_one(server):
    half = cache_folder("models") / "file.bin"
    half.write_bytes(CONTENT[:1000])
    assert fetch(f"{server.url}/good/file.bin", size=len(CONTENT)).read_bytes() == CONTENT


def test_no_server_is_found_out_in_seconds(server):
    server.shutdown()
    server.server_close()
    began = time.time()
    with pytest.raises(FetchError, match="cannot be fetched"):
        fetch(f"{server.url}/good/file.bin")
    assert time.time() - began < 5


def test_full_disk(server, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FetchError, match="the disk has 1,000 free"):
        fetch(f"{server.url}/good/file.bin", size=len(CONTENT))
    assert cached() == []


def test_read_only_cache_is_replaced(tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("KERAS_HOME", str(occupied))  # no folder can be made below a file
    monkeypatch.setattr(fetch_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert cache_folder("models") == tmp_path / "tmp" / ".keras" / "models"


def _fetch_in_process(url, results):
    results.put(fetch(url, size=len(CONTENT), sha256=SHA256).read_bytes() == CONTENT)


def test_two_processes_at_once(server):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    url = f"{server.url}/good/file.bin"
    both = [context.Process(target=_fetch_in_process, args=(url, results)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=30) for _ in both] == [True, True]
    for process in both:
        process.join()
    assert cached() == ["file.bin"]
