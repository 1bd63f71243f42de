"""A short run of what `make fuzz` draws at length: ordinary use loses nothing, alters nothing."""

import keras
import properties
import pytest

EXAMPLES = {"folder": 12, "checkpoint": 15, "order": 4, "command": 2}

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the numbers of the others are tested elsewhere"
)


@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_it_works_or_is_refused_in_a_sentence_and_all_is_as_it_was(name):
    properties.run(name, EXAMPLES[name])
    assert sum(times for (which, _), times in properties.COUNTS.items() if which == name) > 0


def test_the_long_run_counts_and_prints_its_faults(monkeypatch, capsys):
    def fails(name, seed):
        properties.COUNTS[name, "tried"] += 1
        raise AssertionError(f"left out: /tmp/{seed}/a.png")

    monkeypatch.setattr(properties, "run", fails)
    monkeypatch.setattr("sys.argv", ["properties.py", "--minutes", "0.001", "--only", "folder"])
    assert properties.main() == 1
    shown = capsys.readouterr().out
    assert shown.count("FAULT, folder") == 1 and "left out: /tmp/" in shown
