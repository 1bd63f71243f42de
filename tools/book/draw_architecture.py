"""Draw the architecture of a preset with the shapes of a traced model.

    python tools/book/draw_architecture.py

Writes book/_static/architecture.svg for the opening page, and a .png for the README. The
same versions write the same bytes.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import matplotlib

matplotlib.use("agg")

from gcvit import PRESETS, GCViT, explain, figures

STATIC = Path(__file__).resolve().parents[2] / "book" / "_static"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gcvit_xxtiny", choices=sorted(PRESETS))
    parser.add_argument("--out", type=Path, default=STATIC, help="folder to write to")
    arguments = parser.parse_args()

    model = GCViT.from_preset(arguments.preset, weights=None)
    traced = explain.trace(model, PRESETS[arguments.preset]["image_size"])
    figures.use_style()
    figure = figures.architecture(traced, explain.photograph())
    arguments.out.mkdir(parents=True, exist_ok=True)
    # A date or a version in the file would make each run a change.
    figure.savefig(arguments.out / "architecture.svg", metadata={"Date": None, "Creator": None})
    figure.savefig(arguments.out / "architecture.png", dpi=180, metadata={"Software": None})
    for kind in ("svg", "png"):
        path = arguments.out / f"architecture.{kind}"
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
