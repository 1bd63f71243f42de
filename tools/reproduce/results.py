"""What the tools share that record measurements under gcvit/results."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path


def processor():
    """Return the name of the machine's processor."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    return name


def hardware():
    """Return a few words about the machine's processor and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GiB"


def versions(names):
    """Return {name: version} of those distributions that are installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def command(tool):
    """Return how a tool was called, without where the files lie on this machine."""
    given = [Path(x).name if Path(x).is_absolute() else x for x in sys.argv[1:]]
    return shlex.join(["python", f"tools/reproduce/{tool}", *given])


def write(texts):
    """Write {path: text}, each as a whole: a file that is there is kept until then."""
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
