"""Keep the README's table of fidelity as the results under gcvit/ have it.

    python tools/book/readme.py format   # rewrite it
    python tools/book/readme.py check    # exit 1 if another one stands there

The table stands between two comments. It is made of gcvit/results/timm.json and of what the
checkpoint that ships says of its own making.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN = "<!-- `make format` makes this of gcvit/results/timm.json -->\n"
END = "<!-- up to here -->\n"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def shipped_notes():
    """Return the name of the checkpoint that `gcvit_nano` loads by default, and its metadata."""
    # The presets alone: importing the package takes seconds.
    presets = runpy.run_path(str(ROOT / "gcvit" / "presets.py"))["PRESETS"]
    shipped = next(iter(presets["gcvit_nano"]["weights"].values()))
    path = ROOT / "gcvit" / "checkpoints" / shipped["file"]
    with safe_open(path, "numpy") as file:
        return path.stem, file.metadata()


def accuracy(name, notes):
    """Return a sentence on how often the checkpoint that ships is right."""
    shares = f"top-1 {float(notes['top1']):.1%}, top-5 {float(notes['top5']):.1%}"
    return f"The checkpoint that ships, `{name}`, on its validation images: {shares}."


def versions(record):
    """Return a record's versions in words."""
    known = {**BACKENDS, "keras": "Keras", "numpy": "NumPy"}
    return ", ".join(f"{known.get(n, n)} {v}" for n, v in record["versions"].items())


def table(results):
    """Return the largest differences in Markdown: a row for each variant, a column a backend."""
    lines = [f"| variant | image | mean \\|logit\\| | {' | '.join(BACKENDS.values())} |"]
    lines += [f"| --- | ---: | ---: |{' ---: |' * len(BACKENDS)}"]
    for variant, row in results["variants"].items():
        rows = (results["backends"].get(n, {}).get("largest_difference", {}) for n in BACKENDS)
        far = (f"{column[variant]:.1e}" if variant in column else "not run" for column in rows)
        cells = (f"`{variant}`", f"{row['image_size']} px", f"{row['mean_logit']:.2f}", *far)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fidelity(results, name, notes):
    """Return what stands between the comments."""
    ran = [(r["hardware"], versions(r)) for r in results["backends"].values()]
    places = {place: [v for p, v in ran if p == place] for place, _ in ran}
    lines = [
        "The largest difference between the logits of this package and of timm, by variant and",
        "backend, with the same weights on the same photograph, in float32:",
        "",
        *table(results),
        "",
        "The weights are random, drawn so large that every part of the model shows in the logits.",
        f"The reference is {versions(results['timm'])}.",
        *(f"Run on {place}: {'; '.join(named)}." for place, named in places.items()),
        accuracy(name, notes),
    ]
    return "\n".join(lines) + "\n"


def with_table(readme, made):
    """Return the README's text with what is made between its two comments."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README} lacks the line {BEGIN!r}, or {END!r} after it.")
    return before + BEGIN + made + end + after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["format", "check"])
    action = parser.parse_args().action
    results = json.loads((ROOT / "gcvit" / "results" / "timm.json").read_text(encoding="utf-8"))
    before = README.read_text(encoding="utf-8")
    after = with_table(before, fidelity(results, *shipped_notes()))
    if action == "format":
        README.write_text(after, encoding="utf-8")
    elif before != after:
        sys.exit("README.md: the table of fidelity is not that of gcvit/results: make format")


if __name__ == "__main__":
    main()
