"""Measure the page's model beside onnxruntime-web, in one Chromium, and write down the times.

    python tools/reproduce/browser_speed.py [--checkpoint FILE] [--rounds 7]

Both get the same checkpoint and the same image. From the click on a button to the first answer,
all that is needed is loaded over a connection of 10 Mbit/s, gzipped: for the page's model its
scripts and the checkpoint as the book's pages load it, for onnxruntime-web its runtime for
WebAssembly and the model as an ONNX file. Each round opens a fresh page for either, in turn;
medians over the rounds are printed and written to gcvit/results/browser.json. A page that no
server isolates from others may not have threads, and so neither gets any. Another token, head or
switch is timed until the worker has answered: what the page draws then is not counted.

Needs Chromium, npm, PyTorch, onnx and onnxscript, and for the yardstick timm. Run it on a
machine that does nothing else: the file tells its load.
"""

import argparse
import contextlib
import datetime
import gzip
import http.server
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"  # which alone writes ONNX

from playwright.sync_api import sync_playwright
from results import command, hardware, versions, write
from yardstick import seconds as yardstick

from gcvit.explorer import checkpoint_script, explorer
from gcvit.fine_tuning import load_classifier
from gcvit.weights import PACKAGED

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "book"))
import chromium  # noqa: E402

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".html": "text/html"}
CONTESTANTS = ("engine", "onnxruntime")
YARDSTICK = 0.58
"""Seconds of the yardstick on the machine that the page's target of 150 ms is meant for."""
NETWORK = {"downloadThroughput": 10e6 / 8, "uploadThroughput": 10e6 / 8, "latency": 20}
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>Speed</title>
<button>Run it here</button><script type="module">
const SIDE = {{ side }}, REPEATS = 5;
const pixelsOf = (seed) => Uint8Array.from({ length: 3 * SIDE ** 2 }, (_, i) =>
  128 + 60 * Math.sin(i / 50 + seed) + 60 * Math.sin(i * i * 1e-4 * seed));
const timed = async (task) => {
  const began = performance.now();
  await task();
  return performance.now() - began;
};
const repeated = async (task) => {
  const times = [];
  for (let i = 0; i < REPEATS; i++) times.push(await task(i));
  return times;
};

async function engine() {
  const [script, checkpoint] = await Promise.all(["worker", "checkpoint"].map(
    async (name) => (await fetch(name)).text()));
  const worker = new Worker(URL.createObjectURL(new Blob([script])));
  const ask = (name, given = {}) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data: { answer, error } }) =>
      (error ? reject(new Error(error)) : resolve(answer));
    worker.postMessage({ id: 0, name, ...given });
  });
  const bytes = Uint8Array.from(atob(checkpoint.split('"')[3]), (letter) => letter.charCodeAt(0));
  const { levels } = await ask("load", { buffer: bytes.buffer, imageSize: SIDE });
  const last = levels.length - 1;
  const switches = {
    "a head of the last block": { headsOff: { [`levels.${last}.blocks.1`]: [0] } },
    "the last query": { query: { [`levels.${last}`]: "zero" } },
    "the first query": { query: { "levels.0": "zero" } },
    "all position bias": { bias: "off" },
  };
  const run = (chosen = {}) => ask("run", { switches: { query: "own", ...chosen } });
  return {
    take: (seed) => ask("photograph", { pixels: pixelsOf(seed), height: SIDE, width: SIDE }),
    run: async () => {
      const { probabilities } = (await run()).now;
      const most = Math.max(...probabilities);
      return [probabilities.indexOf(most), most];
    },
    more: async () => {
      const report = { look: await repeated((i) => timed(() => ask("attention",
        { level: i % 2, row: i, column: 2 * i, blocks: [0, 1], heads: [i % 2 - 1, 0] }))) };
      report.switches = {};
      for (const [name, chosen] of Object.entries(switches)) {
        let computed;
        const times = await repeated(async () => {
          const time = await timed(async () => ({ computed } = await run(chosen)));
          await run();
          return time;
        });
        report.switches[name] = { times, computed };
      }
      return report;
    },
  };
}

async function onnxruntime() {
  const ort = await import("./ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create("model.onnx");
  const [mean, std] = {{ normalization }};
  let images;
  return {
    take: (seed) => {
      images = new ort.Tensor("float32", Float32Array.from(pixelsOf(seed),
        (value, i) => (value - mean[i % 3]) / std[i % 3]), [1, SIDE, SIDE, 3]);
    },
    run: async () => {
      const results = await session.run({ [session.inputNames[0]]: images });
      const { data } = results[session.outputNames[0]];
      return [data.indexOf(Math.max(...data)), Math.max(...data)];
    },
    more: () => ({}),
  };
}

document.querySelector("button").onclick = async () => {
  const began = performance.now();
  const model = await { engine, onnxruntime }[location.hash.slice(1)]();
  await model.take(1);
  const answer = await model.run();
  const first = performance.now() - began;
  const forward = await repeated(async (i) => {
    await model.take(2 + i);
    return timed(model.run);
  });
  globalThis.report = { first, answer, forward, ...(await model.more()) };
};
</script>"""


def runtime_files():
    """Return {name: bytes} of what onnxruntime-web loads, from the npm registry."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            return {
                name: packed.extractfile(f"package/dist/{name}").read() for name in RUNTIME_FILES
            }


def files_to_serve(checkpoint, side):
    """Return {path: (content type, gzipped bytes)} of all that a page can ask for."""
    classifier = load_classifier(checkpoint, side)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        classifier.model.export(path, format="onnx", external_data=False, verbose=False)
        files = {"model.onnx": path.read_bytes(), **runtime_files()}
    normalization = [[float(value) for value in x] for x in (classifier.mean, classifier.std)]
    page = PAGE.replace("{{ side }}", str(side))
    page = page.replace("{{ normalization }}", json.dumps(normalization))
    folder = Path(explorer.__file__).parent
    scripts = [(folder / name).read_text("utf-8") for name in explorer.WORKER]
    files["page.html"] = page.encode()
    files["worker"] = explorer.as_plain_script("\n".join(scripts)).encode()
    files["checkpoint"] = checkpoint_script(checkpoint).encode()
    return {
        f"/{name}": (TYPES.get(Path(name).suffix, "text/plain"), gzip.compress(content))
        for name, content in files.items()
    }


@contextlib.contextmanager
def serving(files):
    """Serve the files, gzipped and never cached; yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, content = files[self.path]
            self.send_response(200)
            headers = {
                "Content-Type": kind,
                "Content-Encoding": "gzip",
                "Cache-Control": "no-store",
            }
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def measure(browser, url, contestant, throttled=True):
    """Open a fresh page, click, and return what it measured, in ms, and the paths it loaded."""
    with contextlib.closing(browser.new_context()) as context:
        page, loaded = context.new_page(), []
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/page.html#{contestant}")
        page.on("request", lambda request: loaded.append(request.url.removeprefix(url)))
        if throttled:
            session = context.new_cdp_session(page)
            session.send("Network.enable")
            session.send("Network.emulateNetworkConditions", {"offline": False, **NETWORK})
        page.click("button")
        try:
            page.wait_for_function("globalThis.report", timeout=180_000)
        except Exception as error:
            raise RuntimeError(f"{contestant} gave no answer: {errors}") from error
        return page.evaluate("report"), [path for path in loaded if path.startswith("/")]


def median(lists):
    """Return the median of some lists of numbers, taken as one."""
    return round(statistics.median(number for numbers in lists for number in numbers), 1)


def summarize(reports, loaded, files):
    """Return the medians of one contestant's rounds."""
    summary = {
        "first_answer_ms": median([[report["first"]] for report in reports]),
        "first_answer_all_ms": [round(report["first"]) for report in reports],
        "forward_ms": median(report["forward"] for report in reports),
        "loaded_bytes": {path: len(files[path][1]) for path in loaded},
    }
    if "look" in reports[0]:
        summary["another_token_or_head_ms"] = median(report["look"] for report in reports)
        summary["switches"] = {
            name: {
                "ms": median(report["switches"][name]["times"] for report in reports),
                "stages_computed": one["computed"],
            }
            for name, one in reports[0]["switches"].items()
        }
    return summary


def table(summaries, yardsticks):
    """Return the medians as lines of text, for yardsticks that were measured before and after."""
    lines = [f"{'':44}{'engine':>10}{'onnxruntime':>14}"]
    for name, unit in (("first_answer_ms", "from click to answer"), ("forward_ms", "forward pass")):
        numbers = [summaries[contestant][name] for contestant in CONTESTANTS]
        lines.append(f"{unit + ', ms':44}{numbers[0]:10.0f}{numbers[1]:14.0f}")
    sizes = [sum(summaries[one]["loaded_bytes"].values()) / 1e6 for one in CONTESTANTS]
    lines.append(f"{'loaded, MB gzipped':44}{sizes[0]:10.2f}{sizes[1]:14.2f}")
    ours, seconds = summaries["engine"], statistics.mean(yardsticks)
    before, after = yardsticks
    lines.append(f"{'yardstick before and after, s':44}{before:10.2f}{after:14.2f}")
    label = f"forward pass at a yardstick of {YARDSTICK} s, ms"
    lines.append(f"{label:44}{ours['forward_ms'] * YARDSTICK / seconds:10.0f}")
    lines.append(f"{'another token or head, ms':44}{ours['another_token_or_head_ms']:10.1f}")
    for name, one in ours["switches"].items():
        label = f"{name} ({one['stages_computed']} stages), ms"
        lines.append(f"{label:44}{one['ms']:10.0f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    (packaged,) = sorted(PACKAGED.glob("*.safetensors"))
    parser.add_argument("--checkpoint", type=Path, default=packaged)
    parser.add_argument("--size", type=int, default=128, help="side of the image in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "gcvit" / "results" / "browser.json")
    arguments = parser.parse_args()
    files = files_to_serve(arguments.checkpoint, arguments.size)
    load, before = [round(x, 2) for x in os.getloadavg()], yardstick()  # which is a load itself
    reports, loaded = {one: [] for one in CONTESTANTS}, {}
    with sync_playwright() as playwright, serving(files) as url:
        browser = chromium.launch(playwright)
        browser_version = browser.version
        for _ in range(arguments.rounds):
            for contestant in CONTESTANTS:
                report, loaded[contestant] = measure(browser, url, contestant)
                reports[contestant].append(report)
        browser.close()
    (label, probability), (other, share) = (reports[one][0]["answer"] for one in CONTESTANTS)
    if label != other or abs(probability - share) > 1e-4:
        raise RuntimeError(f"The answers differ: {label} {probability} and {other} {share}.")
    summaries = {one: summarize(reports[one], loaded[one], files) for one in CONTESTANTS}
    result = {
        "command": command(Path(__file__).name),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "load_before_and_after": [load, [round(x, 2) for x in os.getloadavg()]],
        "yardstick_s_before_and_after": [round(x, 3) for x in (before, yardstick())],
        "versions": {
            "chromium": browser_version,
            "onnxruntime-web": RUNTIME.split("@")[1],
            **versions(("gcvit-book", "keras", "torch", "onnx", "onnxscript", "playwright")),
        },
        "checkpoint": arguments.checkpoint.name,
        "image_px": arguments.size,
        "rounds": arguments.rounds,
        "network": NETWORK,
        "contestants": summaries,
    }
    write({arguments.out: json.dumps(result, indent=1) + "\n"})
    print(table(summaries, result["yardstick_s_before_and_after"]))


if __name__ == "__main__":
    main()
