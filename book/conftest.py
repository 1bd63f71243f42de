"""`pytest --nbmake book` also shows that each exercise fails until it is solved.

Jupyter leaves a cell out that is tagged skip-execution, as every unsolved exercise is. Here it
runs where it stands, in a copy of the chapter's namespace, and must end in an AssertionError.
The notebook stays as it is. Kernels talk through files (tools/book/kernels.py).
"""

import copy

from kernels import talk_through_files
from nbclient import NotebookClient

talk_through_files()

UNSOLVED = """
try:
    exec(compile({source!r}, "exercise", "exec"), dict(globals()))
except AssertionError:
    pass
else:
    raise AssertionError("This exercise passes as it stands, before it is solved.")
"""
execute_cell = NotebookClient.async_execute_cell


async def execute_cell_or_exercise(self, cell, cell_index, **options):
    if "exercise" not in cell.metadata.get("tags", []):
        return await execute_cell(self, cell, cell_index, **options)
    unsolved = copy.deepcopy(cell)
    unsolved.metadata.tags = []
    unsolved.source = UNSOLVED.format(source=cell.source)
    try:
        await execute_cell(self, unsolved, cell_index, **options)
        self.nb.cells[cell_index] = cell
    except Exception:
        self.nb.cells[cell_index] = unsolved  # nbmake reports the error that is in its outputs
        raise
    return cell


NotebookClient.async_execute_cell = execute_cell_or_exercise
