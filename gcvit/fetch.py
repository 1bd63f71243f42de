"""Downloads that are whole or not there."""

import hashlib
import os
import re
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

import keras

TIMEOUT = 10
"""Seconds without an answer, or without a further byte, after which a download is given up."""

LARGEST = 2_000_000_000
"""Bytes after which a download of unknown size is given up."""

OFFLINE = ("1", "ON", "YES", "TRUE")
"""Values of `HF_HUB_OFFLINE` by which Hugging Face's library keeps from the network."""

ABANDONED = 3600
"""Seconds without a further byte after which a part of a file is nobody's any more."""


class FetchError(OSError):
    """A file cannot be fetched; the cache holds no part of it."""


def cache_folders(name):
    """Return the folders in which a file is looked for and, in this order, written.

    The first is in Keras's cache (`KERAS_HOME`, or `~/.keras`). The second, beside the
    system's temporary files, is for where the first cannot be written to, as in Keras.
    """
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    return [home / name, Path(tempfile.gettempdir()) / ".keras" / name]


def mirrored(url):
    """Return an address at huggingface.co as `HF_ENDPOINT`, where it is set, has it.

    The variable names a mirror, as it does for Hugging Face's own library.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if not endpoint:
        return url
    return re.sub(r"^https://huggingface\.co(?=/)", lambda _: endpoint, url)


def fetch(url, size=None, sha256=None, name=None, folder="models", timeout=TIMEOUT):
    """Return the path of a file in the cache, fetched once, with a progress bar.

    The file appears under its name only when it is whole: it is written beside it, its
    size and hash are checked, and it is moved. Two processes may fetch it at once.

    Args:
        url: where it is. What is at huggingface.co comes from `HF_ENDPOINT` where that is set.
        size: its size in bytes, if known.
        sha256: its hash, if known.
        name: its name in the cache; default `None`: the last part of `url`.
        folder: folder in the cache; default "models".
        timeout: seconds to wait for the server at any point; default `TIMEOUT`.

    Raises:
        FetchError: if it cannot be had, or is not what was expected.
    """
    name = name or url.rsplit("/", 1)[-1]
    of_hub, url = "huggingface.co" in url, mirrored(url)
    places = cache_folders(folder)
    for place in places:
        path = place / name
        if path.is_file() and (size is None or path.stat().st_size == size):
            return path
    if of_hub and os.environ.get("HF_HUB_OFFLINE", "0").upper() in OFFLINE:
        raise FetchError(
            f"{url} is not in {places[0]}, and HF_HUB_OFFLINE is set: nothing is sought."
        )
    unfinished = None
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            path, out = _begin(places, name)
            unfinished = Path(out.name)
            with out:
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
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
    return path


def _begin(folders, name):
    """Return where a file shall be, and an open file beside it, in the first folder that can."""
    failures = []
    for folder in folders:
        # Tried, not asked: what a folder's permissions say is not always so.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            out = open(folder / f"{name}.{os.getpid()}.part", "wb")
        except OSError as error:
            failures.append(f"{folder} ({error.strerror or error})")
            continue
        _remove_abandoned(folder, name)
        return folder / name, out
    raise FetchError(f"No folder to keep {name} in: {', '.join(failures)}.")


def _remove_abandoned(folder, name):
    """Remove what downloads of a file left that were killed."""
    for part in folder.glob(f"{name}.*.part"):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
        except OSError:  # another process was faster, or it is another user's
            pass


def _is_web_page(start):
    return start.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _copy(answer, out, url, size):
    announced = answer.headers.get("Content-Length")
    announced = int(announced) if announced else None
    expected = size or announced
    chunk = answer.read(1 << 18)
    # Some proxies do not say what they answer with.
    if "text/html" in (answer.headers.get("Content-Type") or "") or _is_web_page(chunk):
        raise FetchError(f"{url} answers with a web page, not with a file.")
    if size is not None and announced not in (None, size):
        raise FetchError(f"{url} offers {announced:,} bytes; {size:,} were expected.")
    largest = expected or LARGEST
    free = shutil.disk_usage(os.path.dirname(out.name)).free
    if expected and free < expected:
        raise FetchError(f"{url} needs {expected:,} bytes; the disk has {free:,} free.")
    print(f"Fetching {url}")
    bar = keras.utils.Progbar(expected, unit_name="byte")
    digest, done = hashlib.sha256(), 0
    while chunk:
        done += len(chunk)
        if done > largest:
            raise FetchError(f"{url} sends more than the {largest:,} bytes expected.")
        out.write(chunk)
        digest.update(chunk)
        bar.update(done, finalize=False)
        chunk = answer.read(1 << 18)
    if expected is not None and done != expected:
        raise FetchError(f"{url} broke off after {done:,} of {expected:,} bytes.")
    bar.update(done, finalize=True)
    return digest.hexdigest()
