"""How kernels that run side by side are kept apart."""

import os
import tempfile
import uuid
from pathlib import Path

from nbclient import NotebookClient


def talk_through_files():
    """Connect every kernel through files: two that start at once may draw the same port."""
    if os.name != "posix":  # ZeroMQ has no such files elsewhere
        return
    create = NotebookClient.create_kernel_manager

    def create_with_files(self):
        manager = create(self)
        manager.transport = "ipc"
        # By default a path seen from here, which the kernel sees from its own folder.
        manager.ip = str(Path(tempfile.gettempdir(), uuid.uuid4().hex))
        return manager

    NotebookClient.create_kernel_manager = create_with_files
