"""Ask every address that the package downloads from whether the file is still there.

    python tools/book/check_addresses.py

Nothing is downloaded: a HEAD request must answer with a file, of the size that is known.
"""

import sys
import time
import urllib.request

from gcvit import PRESETS
from gcvit.fetch import TIMEOUT
from gcvit.fine_tuning.datasets import FLOWERS_ARCHIVE, FLOWERS_URL

ATTEMPTS = 3


def addresses():
    """Return {address: size in bytes, or None} of all that a reader's run may fetch."""
    found = {FLOWERS_URL: FLOWERS_ARCHIVE["size"]}
    for preset in PRESETS.values():
        found |= {w["url"]: w["size"] for w in preset["weights"].values() if "url" in w}
    return found


def fault(url, size=None, attempts=ATTEMPTS, pause=5.0):
    """Return what is wrong with an address, or `None`.

    Args:
        url: the address.
        size: bytes that it should have; default `None`: any.
        attempts: how often to ask before giving up; default `ATTEMPTS`.
        pause: seconds between two attempts; default 5.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause)
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                headers = answer.headers
        except (OSError, ValueError) as error:
            reason = f"{url} does not answer: {error}"
            continue
        kind, length = headers.get("Content-Type") or "", headers.get("Content-Length")
        if "text/html" in kind:
            return f"{url} answers with a web page"
        if size is not None and int(length or size) != size:
            return f"{url} has {int(length):,} bytes; {size:,} were expected"
        return None
    return reason


def main():
    found = addresses()
    faults = [said for said in (fault(url, size) for url, size in found.items()) if said]
    print(f"{len(found) - len(faults)} of {len(found)} addresses answer as they should")
    sys.exit("\n".join(faults) if faults else None)


if __name__ == "__main__":
    main()
