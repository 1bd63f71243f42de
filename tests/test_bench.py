"""The harness with contestants that measure nothing."""

import json
import sys

import bench
import keras
import numpy as np
import pytest

from gcvit import GCViT

CASE = {"task": "forward", "preset": "p", "precision": "float32", "windows": "scaled"}
CASE |= {"batch": 2, "size": 64, "cores": 1}


def answers(seconds, ends_after=99):
    """Return a program that answers as a contestant's process does, for so many repetitions."""
    return f"""
import json, sys
print(json.dumps(dict(images_a_call=4, first_call_s=9.0)), flush=True)
found = dict(
    repeat=dict(seconds={seconds}, cpu_seconds={2 * seconds}, others=0.5),
    end=dict(peak_bytes=2**20, accelerator=None),
)
for n, line in enumerate(sys.stdin):
    if n > {ends_after}:
        raise MemoryError("no room")
    print(json.dumps(found[line.strip()]), flush=True)
    if line.strip() == "end":
        break
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Return what starts programs, by contestant, in place of the contestants' own.

    It returns a list that fills with the environments they are started in.
    """
    started = bench.subprocess.Popen

    def replace(programs):
        environments = []

        def popen(command, **options):
            environments.append(options["env"])
            name = json.loads(command[-1])[1]
            return started([sys.executable, "-c", programs[name]], **options)

        monkeypatch.setattr(bench.subprocess, "Popen", popen)
        return environments

    return replace


@pytest.fixture
def records(stand_in):
    programs = {"timm eager": answers(3.0), "jax jit": answers(1.5), "torch eager": answers(1, 1)}
    programs["torch compile"] = "raise ImportError('not here')"
    programs |= {"jax eager": answers(1, -1), "jax predict": answers(1, 2)}
    stand_in(programs)
    contestants = (bench.Contestant(name, CASE) for name in programs)
    return bench.with_ratios(bench.measure(CASE, contestants, repetitions=3, seconds=9))


def test_each_contestant_is_measured_and_one_that_fails_is_told(records):
    by_name = {record["contestant"]: record for record in records}
    ours = by_name["jax jit"]
    assert ours["median_s"] == 0.75 and ours["images_per_s"] == 2 / 0.75  # a call: two batches
    assert ours["cpu_median_s"] == 1.5 and ours["compile_s"] == 7.5 and ours["repetitions"] == 3
    assert ours["times_timm_eager"] == 2 and by_name["timm eager"]["times_timm_eager"] == 1
    assert by_name["torch eager"]["error"] == "MemoryError: no room"
    assert by_name["torch compile"]["error"] == "ImportError: not here"
    assert by_name["jax eager"]["error"] == "MemoryError: no room"
    assert by_name["jax predict"]["error"] == "MemoryError: no room"


def test_one_that_is_not_ready_in_time_is_left_out(stand_in):
    stand_in({"jax jit": "import time; time.sleep(60)", "timm eager": answers(1.0)})
    quick, slow = (bench.Contestant(name, CASE) for name in ("timm eager", "jax jit"))
    quick.prepare(60)
    slow.prepare(0.01)
    for contestant in (quick, slow):
        contestant.prepare = lambda seconds: None
    records = bench.measure(CASE, [quick, slow], repetitions=3, seconds=9)
    assert [record.get("error") for record in records] == [None, "not ready after 0 s"]


def test_the_table_has_a_row_for_each(records):
    about = {"hardware": "h", "accelerator": None, "commands": ["c"], "versions": {}}
    rows = bench.tables({**about, "records": records}).splitlines()
    assert any(row.startswith("| jax jit | 750.0 (750.0 to 750.0) | 2.7 | 2.00 |") for row in rows)
    assert any("failed: MemoryError: no room" in row for row in rows)


def test_ratios_are_taken_within_a_case():
    other = {**CASE, "batch": 1}
    numbers = {"median_s": 1.0, "cpu_median_s": 1.0}
    lone = {**other, "contestant": "jax jit", **numbers}
    timm = {**CASE, "contestant": "timm eager", **numbers}
    assert "times_timm_eager" not in bench.with_ratios([lone, timm])[0]


def test_contestants_are_those_installed_that_fit_a_pattern(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name != "torch" or None)
    assert bench.contestants("step", ["jax *", "t* eager", "tensorflow fit"]) == [
        "tensorflow fit",
        "jax jit",
        "jax fit",
    ]  # timm's needs PyTorch


@pytest.fixture
def sitting(stand_in, monkeypatch, tmp_path):
    """Return what runs the tool with contestants that measure nothing, and its results."""
    monkeypatch.setattr(bench, "contestants", lambda task, patterns: ["timm eager", "jax jit"])
    environments = stand_in({"timm eager": answers(3.0), "jax jit": answers(1.5)})

    def run(*options):
        out = tmp_path / "bench.json"
        arguments = ["bench.py", "--out", str(out), "--repetitions", "2", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        environments.clear()
        bench.main()
        return json.loads(out.read_text()), out.with_suffix(".md").read_text(), environments

    return run


ONE = ("--tasks", "forward", "--batches", "4", "--sizes", "64")


def test_a_sitting_goes_on_where_the_last_one_ended(sitting, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=2")
    results, table, environments = sitting(*ONE)
    assert [r["contestant"] for r in results["records"]] == ["timm eager", "jax jit"]
    assert [env["KERAS_BACKEND"] for env in environments] == ["torch", "jax"]
    assert results["environment"]["XLA_FLAGS"] == "--xla_one=2"
    assert results["records"][1]["times_timm_eager"] == 2
    assert "| jax jit | 1500.0 (1500.0 to 1500.0) | 2.7 | 2.00 |" in table
    capsys.readouterr()
    _, _, environments = sitting(*ONE)
    assert environments == [] and "--again measures it anew" in capsys.readouterr().out
    results, _, environments = sitting(*ONE, "--again", "--side-by-side")
    assert len(results["records"]) == len(environments) == 2
    results, _, _ = sitting("--tasks", "step", "--batches", "4", "--sizes", "64")
    assert [r["task"] for r in results["records"]] == ["forward"] * 2 + ["step"] * 2
    assert len(results["commands"]) == 3


def test_a_call_is_one_run_of_the_task(monkeypatch):
    backend = keras.backend.backend()
    case = {**CASE, "preset": "gcvit_nano", "size": 64}
    predict, images = bench.gcvit_call(case, backend, "predict")
    assert images == 2 * bench.BATCHES_A_CALL
    assert predict().shape == (images, 200) and np.isfinite(predict()).all()

    def smaller(preset, weights, image_size, **settings):
        """Stand for the preset, whose training step takes half a minute to compile."""
        model = GCViT((4,), 8, (1,), (1,), num_classes=200, **settings)
        model.build((None, 64, 64, 3))
        return model

    monkeypatch.setattr(GCViT, "from_preset", smaller)
    mode = next(iter(bench.MODES[backend]))
    step, images = bench.gcvit_call({**case, "task": "step"}, backend, mode)
    assert images == 2 and np.isfinite([step(), step()]).all()
