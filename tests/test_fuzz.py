"""A short run of `make fuzz`: hostile checkpoints do no harm."""

from fuzz import READERS, available, fuzz

FILES = 200


def test_hostile_files_are_refused_or_give_exactly_the_right_weights():
    readers = [reader for reader in READERS if available(reader)]
    counts, faults = fuzz(readers, FILES, seed=1)
    assert faults == []
    for reader in readers:
        assert sum(counts[reader].values()) == FILES
        assert counts[reader]["refused"] > FILES / 2 and counts[reader]["right"] > 0
