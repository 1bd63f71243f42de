"""Downloads against a local server: each failure leaves the cache as it was."""

import ast
import errno
import hashlib
import http.server
import multiprocessing
import os
import pickle
import resource
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import same_weights, serving, weights_of

from gcvit import CheckpointError, FetchError, GCViT, load_checkpoint
from gcvit import fetch as fetch_module
from gcvit.fetch import cache_folders, fetch

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


PAGE = b"\n<!DOCTYPE html><html>Log in to the network</html>"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "missing":
            return self.send_error(404)
        body = {"html": b"Log in", "disguised": PAGE, "garbage": b"\0" * len(CONTENT)}
        body = body.get(kind, CONTENT)
        self.send_response(200)
        form = "text/html" if kind == "html" else "application/octet-stream"
        self.send_header("Content-Type", form)
        if kind != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if kind in ("broken", "stalled"):
                self.wfile.write(body[: len(body) * 3 // 4])
                self.wfile.flush()
                if kind == "stalled":
                    self.server.over.wait(10)
            else:
                if kind == "together":
                    self.server.both.wait(10)
                for _ in range(100 if kind == "endless" else 1):
                    self.wfile.write(body)
        except OSError:  # the other side hung up
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    with serving(Handler) as server:
        server.requests, server.over, server.both = [], threading.Event(), threading.Barrier(2)
        yield server
        server.over.set()


def cached(place=0):
    folder = cache_folders("models")[place]
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def good(server):
    """Fetch what is well, as the next run would; return its bytes."""
    return fetch(f"{server.url}/good/file.bin", size=len(CONTENT), sha256=SHA256).read_bytes()


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
        ("disguised", "answers with a web page"),
        ("broken", "broke off after|IncompleteRead|cannot be fetched"),
        ("stalled", "timed out"),
        ("garbage", "has the hash"),
        ("endless", "sends more than the 512,000 bytes"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_the_next_run_working(server, kind, message):
    with pytest.raises(FetchError, match=message):
        fetch(f"{server.url}/{kind}/file.bin", size=len(CONTENT), sha256=SHA256, timeout=0.5)
    assert cached() == []
    assert good(server) == CONTENT


def test_a_mirror_of_hugging_face_is_used(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    path = fetch("https://huggingface.co/good/file.bin", size=len(CONTENT), sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/good/file.bin"]
    assert good(server) == CONTENT  # other addresses stay


def test_no_network_is_used_where_it_is_forbidden(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="and HF_HUB_OFFLINE is set"):
        fetch("https://huggingface.co/good/file.bin")
    assert server.requests == []
    good(server)


def test_another_size_than_expected_is_refused(server):
    with pytest.raises(FetchError, match="offers 512,000 bytes; 600,000 were expected"):
        fetch(f"{server.url}/good/file.bin", size=600_000)


def test_a_download_of_unknown_size_has_a_limit_too(server, monkeypatch):
    monkeypatch.setattr(fetch_module, "LARGEST", 3_000_000)
    with pytest.raises(FetchError, match="sends more than the 3,000,000 bytes"):
        fetch(f"{server.url}/endless/file.bin")
    assert cached() == []


def test_half_a_file_in_the_cache_is_not_taken_for_a_whole_one(server):
    half = cache_folders("models")[0] / "file.bin"
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT[:1000])
    assert good(server) == CONTENT


def test_no_server_is_found_out_in_seconds(server):
    server.shutdown()
    server.server_close()
    began = time.time()
    with pytest.raises(FetchError, match="cannot be fetched"):
        good(server)
    assert time.time() - began < 5


def test_a_disk_that_is_known_to_be_full(server, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr(fetch_module.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(FetchError, match="the disk has 1,000 free"):
            good(server)
    assert cached() == []
    assert good(server) == CONTENT


def test_a_disk_that_fills_up_meanwhile(server):
    """The system lets this process write no file larger than 300,000 bytes: not even root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(FetchError, match=f"cannot be fetched: .*{os.strerror(errno.EFBIG)}"):
            good(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cached() == []
    assert good(server) == CONTENT


def read_only(monkeypatch, folders):
    """Let no file be opened for writing in some folders; permissions do not hold root back."""

    def refusing(path, mode="r", *args, **kwargs):
        if "w" in mode and os.path.dirname(path) in map(str, folders):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(fetch_module, "open", refusing, raising=False)


def test_read_only_cache_is_replaced(server, monkeypatch):
    home, other = cache_folders("models")
    read_only(monkeypatch, [home])
    assert good(server) == CONTENT
    assert (cached(0), cached(1)) == ([], ["file.bin"])
    good(server)
    assert len(server.requests) == 1  # found where it was put


def test_a_file_where_the_cache_should_be(server, tmp_path):
    (tmp_path / "home").write_text("")  # no folder can be made below a file
    assert good(server) == CONTENT
    assert cached(1) == ["file.bin"]


def test_what_a_read_only_cache_holds_is_used(server, monkeypatch):
    good(server)
    read_only(monkeypatch, [cache_folders("models")[0]])
    assert good(server) == CONTENT
    assert len(server.requests) == 1


def test_no_cache_can_be_written_to(server, monkeypatch):
    with monkeypatch.context() as patched:
        read_only(patched, cache_folders("models"))
        with pytest.raises(FetchError, match=r"No folder to keep file\.bin in: .*home.*tmp"):
            good(server)
    assert good(server) == CONTENT


FORK = multiprocessing.get_context("fork")


def _fetch_in_process(url, results):
    results.put(fetch(url, size=len(CONTENT), sha256=SHA256).read_bytes() == CONTENT)


def test_two_processes_at_once(server):
    results = FORK.Queue()
    url = f"{server.url}/together/file.bin"
    both = [FORK.Process(target=_fetch_in_process, args=(url, results)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=30) for _ in both] == [True, True]
    for process in both:
        process.join()
    assert cached() == ["file.bin"]


def test_a_download_that_is_killed(server, monkeypatch):
    url = f"{server.url}/stalled/file.bin"
    process = FORK.Process(target=_fetch_in_process, args=(url, FORK.Queue()))
    process.start()
    until = time.time() + 10
    while not cached() and time.time() < until:
        time.sleep(0.01)
    process.kill()  # SIGKILL: nothing is tidied up
    process.join()
    left = f"file.bin.{process.pid}.part"
    assert cached() == [left]
    assert good(server) == CONTENT
    assert cached() == ["file.bin", left]  # it might be a download that goes on
    hours_ago = time.time() - 2 * fetch_module.ABANDONED
    os.utime(cache_folders("models")[0] / left, (hours_ago, hours_ago))
    (cache_folders("models")[0] / "file.bin").unlink()
    assert good(server) == CONTENT
    assert cached() == ["file.bin"]


class Runs:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_nothing_unpickles(tmp_path):
    model = GCViT(window_size=(4,), embed_dim=8, depths=(1,), num_heads=(2,), num_classes=3)
    model.build((None, 32, 32, 3))
    before, marker = weights_of(model), tmp_path / "code_ran"
    hostile = pickle.dumps(Runs(marker), protocol=2)
    (tmp_path / "bare.pth.tar").write_bytes(hostile)
    with zipfile.ZipFile(tmp_path / "zipped.pth.tar", "w") as archive:
        archive.writestr("archive/data.pkl", hostile)
        archive.writestr("archive/version", "3")
    for path in tmp_path.glob("*.pth.tar"):
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(model, path)
    assert same_weights(model, before) and not marker.exists()
    pickle.loads(hostile)
    assert marker.exists()  # it would have been seen


def test_no_loader_is_told_to_unpickle():
    """torch.load says weights_only=True; nothing asks for pickles or for unsafe objects."""
    loads = []
    for path in Path(fetch_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                assert not {"pickle", "joblib", "dill", "shelve", "marshal"} & set(
                    [*names, getattr(node, "module", None)]
                ), path
            if isinstance(node, ast.Call):
                call, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
                assert not {"allow_pickle", "safe_mode"} & set(options), path
                assert "unsafe" not in call, path
                if call.startswith("torch") and call.endswith("load"):
                    loads.append(ast.unparse(options["weights_only"]))
    assert loads == ["True"]
