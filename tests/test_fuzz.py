"""A short run of `make fuzz`: hostile checkpoints do no harm."""

import subprocess

import fuzz
import pytest

FILES = 150


def test_hostile_files_are_refused_or_give_exactly_the_right_weights():
    counts, faults = fuzz.fuzz(FILES, seed=1)
    assert faults == [] and len(counts) >= 4
    for reader, outcomes in counts.items():
        assert sum(outcomes.values()) == FILES, reader
        assert outcomes["refused"] > FILES / 2 and outcomes["right"] > 0, reader


def test_each_kind_of_harm_is_told(monkeypatch):
    """A worker that says so, one that dies at a file, and one that never starts."""
    lines = [
        '{"reader": "keras", "file": 0, "kind": "none", "outcome": "WRONG: crashes, or hangs"}',
        '{"reader": "keras", "file": 0, "kind": "none", "outcome": "right"}',
        '{"reader": "keras", "file": 1, "kind": "bomb", "outcome": "WRONG: crashes, or hangs"}',
    ]

    def after(printed, code):
        done = subprocess.CompletedProcess([], code, "\n".join(printed), "Killed")
        monkeypatch.setattr(fuzz.subprocess, "run", lambda *given, **options: done)
        return fuzz.fuzz(2)

    counts, (fault,) = after(lines, -9)
    assert counts["keras"] == {"right": 1, "WRONG": 1}
    assert fault["outcome"] == "WRONG: crashes, or hangs, exit code -9: Killed"
    assert after(lines[:2], 0)[1] == []
    with pytest.raises(RuntimeError, match="did not start, exit code 1: Killed"):
        after([], 1)
