"""Downloads that are whole or not there."""

import hashlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import keras

TIMEOUT = 10
"""Seconds without an answer, or without a further byte, after which a download is given up."""

LARGEST = 2_000_000_000
"""Bytes after which a download of unknown size is given up."""


class FetchError(OSError):
    """A file cannot be fetched; the cache holds no part of it."""


def cache_folder(name):
    """Return a folder in Keras's cache (`KERAS_HOME`, or `~/.keras`), made if need be.

    Where that cannot be written to, a folder beside the system's temporary files is
    used, as Keras does.
    """
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        (home / name).mkdir(parents=True, exist_ok=True)
        if os.access(home / name, os.W_OK):
            return home / name
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / ".keras" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(url, size=None, sha256=None, name=None, folder="models", timeout=TIMEOUT):
    """Return the path of a file in the cache, fetched once, with a progress bar.

    The file appears under its name only when it is whole: it is written beside it, its
    size and hash are checked, and it is moved. Two processes may fetch it at once.

    Args:
        url: where it is.
        size: its size in bytes, if known.
        sha256: its hash, if known.
        name: its name in the cache; default `None`: the last part of `url`.
        folder: folder in the cache; default "models".
        timeout: seconds to wait for the server at any point; default `TIMEOUT`.

    Raises:
        FetchError: if it cannot be had, or is not what was expected.
    """
    path = cache_folder(folder) / (name or url.rsplit("/", 1)[-1])
    if path.is_file() and (size is None or path.stat().st_size == size):
        return path
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer, open(unfinished, "wb") as out:
            digest = _copy(answer, out, url, size)
        if sha256 is not None and digest != sha256:
            raise FetchError(f"{url} has the hash {digest}; {sha256} was expected.")
        os.replace(unfinished, path)
    except FetchError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchError(f"{url} cannot be fetched: {reason}.") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _copy(answer, out, url, size):
    announced = answer.headers.get("Content-Length")
    announced = int(announced) if announced else None
    expected = size or announced
    if size is not None and announced not in (None, size):
        raise FetchError(f"{url} offers {announced:,} bytes; {size:,} were expected.")
    if "text/html" in (answer.headers.get("Content-Type") or ""):
        raise FetchError(f"{url} answers with a web page, not with a file.")
    largest = expected or LARGEST
    free = shutil.disk_usage(os.path.dirname(out.name)).free
    if expected and free < expected:
        raise FetchError(f"{url} needs {expected:,} bytes; the disk has {free:,} free.")
    print(f"Fetching {url}")
    bar = keras.utils.Progbar(expected, unit_name="byte")
    digest, done = hashlib.sha256(), 0
    while chunk := answer.read(1 << 18):
        done += len(chunk)
        if done > largest:
            raise FetchError(f"{url} sends more than the {largest:,} bytes expected.")
        out.write(chunk)
        digest.update(chunk)
        bar.update(done, finalize=False)
    if expected is not None and done != expected:
        raise FetchError(f"{url} broke off after {done:,} of {expected:,} bytes.")
    bar.update(done, finalize=True)
    return digest.hexdigest()
