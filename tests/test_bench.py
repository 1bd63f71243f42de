"""The harness with contestants that measure nothing."""

import json
import sys

import bench
import pytest

CASE = {"task": "forward", "preset": "p", "precision": "float32", "windows": "scaled"}
CASE |= {"batch": 2, "size": 64, "cores": 1}


def answers(seconds, ends_after=99):
    """Return a program that answers as a contestant's process does, for so many repetitions."""
    return f"""
import json, sys
print(json.dumps(dict(images_a_call=4, first_call_s=9.0, accelerator=None, bytes_moved=None)))
sys.stdout.flush()
found = dict(
    settle=dict(calls_a_repetition=1),
    repeat=dict(seconds={seconds}, cpu_seconds={2 * seconds}, others=0.5),
    end=dict(peak_bytes=2**20),
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
    programs |= {"jax eager": answers(1, -1), "jax predict": answers(1, 3)}
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
    slow, quick = (bench.Contestant(name, CASE) for name in ("jax jit", "timm eager"))
    quick.prepare()
    slow.prepare(until=bench.time.perf_counter())
    records = bench.measure(CASE, [slow, quick], repetitions=3, seconds=9)
    assert [record.get("error") for record in records] == ["not ready in time", None]


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


def test_contestants_are_chosen_by_pattern():
    arguments = bench.parse(["--contestants", "jax *", "timm eager", "--without", "* eager"])
    assert bench.chosen(["jax jit", "jax eager", "timm eager"], arguments) == ["jax jit"]


def test_a_variable_of_the_environment_makes_a_second_contestant(monkeypatch, stand_in, capsys):
    arguments = bench.parse(["--contestants", "jax jit", "--variable", "A=b=c"])
    names = bench.chosen(["jax jit", "jax eager"], arguments)
    assert names == ["jax jit", "jax jit A=b=c"]
    seen = stand_in(dict.fromkeys(names, answers(1.0)))
    monkeypatch.delenv("A", raising=False)
    contestants = (bench.Contestant(name, CASE) for name in names)
    records = bench.measure(CASE, contestants, repetitions=3, seconds=9)
    assert [r["contestant"] for r in records] == names
    assert [env.get("A") for env in seen] == [None, "b=c"]
    assert [env["KERAS_BACKEND"] for env in seen] == ["jax", "jax"]
    with pytest.raises(SystemExit):
        bench.parse(["--variable", "A b"])
    assert "wants NAME=VALUE" in capsys.readouterr().err


def test_a_hidden_package_is_as_if_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    bench.hide({"wave"})
    assert bench.importlib.util.find_spec("wave") is None
    with pytest.raises(ModuleNotFoundError, match="wave"):
        import wave  # noqa: F401
    assert bench.importlib.util.find_spec("json.decoder") is not None
