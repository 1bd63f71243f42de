"""The system's Chromium, driven by Playwright, which downloads none of its own."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def executable():
    """Return the path of a Chromium or Chrome, or `None`."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def launch(playwright):
    """Start the browser.

    Raises:
        FileNotFoundError: where the system has none.
    """
    path = executable()
    if path is None:
        raise FileNotFoundError(f"There is no Chromium here, under any name of {', '.join(NAMES)}.")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)
