"""The stand-in for Colab says which versions it has, and its data fit what the book asks for."""

import re
import tomllib
from pathlib import Path

from colab_run import LAST_PASSED, host_versions, version_differences
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PINS = LAST_PASSED.read_text(encoding="utf-8")


def test_each_other_version_is_named():
    wanted = "# Python 3.13\n# numpy==1 in a comment\nnumpy==2.1.3\njupyter-client==7.4.9\nsix==1\n"
    here = {"python": "3.13.5", "numpy": "2.1.3", "jupyter-client": "7.4.9", "six": "1"}
    assert list(version_differences(wanted, here)) == []
    here |= {"python": "3.11.4", "numpy": "2.4.6"}
    del here["six"]
    assert list(version_differences(wanted, here)) == [
        "Python 3.11.4 for 3.13",
        "numpy 2.4.6 for 2.1.3",
        "six none for 1",
    ]
    assert list(version_differences("# Python 3.1\n", here)) == ["Python 3.11.4 for 3.1"]


def test_this_environment_is_read_under_normalized_names():
    here = host_versions()
    wanted = "".join(f"{name}=={version}\n" for name, version in here.items() if name != "python")
    assert "jupyter-client" in here and list(version_differences(wanted, here)) == []


def test_what_colab_has_is_not_replaced_by_what_the_book_asks_for():
    """A package that Colab has lies within the book's range, so pip leaves it as it is."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", PINS, re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["chapters"]
    compared = [
        (requirement, pins[name])
        for requirement in map(Requirement, wanted)
        if (name := re.sub(r"[-_.]+", "-", requirement.name).lower()) in pins
    ]
    assert {"keras", "numpy", "tensorflow"} <= {requirement.name for requirement, _ in compared}
    for requirement, version in compared:
        assert requirement.specifier.contains(version), (requirement, version)


def test_the_versions_are_dated():
    assert re.fullmatch(r"colab-20\d\d-\d\d\.txt", LAST_PASSED.name)
    assert re.match(r"# Python 3\.\d+\n# .* on 20\d\d-\d\d-\d\d,", PINS)
    assert not re.search("^[^#].*(?<!=)=(?!=)|^[^#].*http", PINS, re.M)
