"""Lets timm be imported where torchvision is not: its models need only names from it.

timm depends on torchvision, of which there is not a build for every build of PyTorch. None of
what is named here can be called.
"""

import importlib.machinery
import importlib.util
import sys
import types

MODULES = ("", ".datasets", ".datasets.folder", ".models", ".models.feature_extraction", ".ops")
MODULES += (".ops.misc", ".transforms", ".transforms.functional", ".utils")


class InterpolationMode:
    """The names that timm reads while it is imported."""

    NEAREST, BILINEAR, BICUBIC = "nearest", "bilinear", "bicubic"
    BOX, HAMMING, LANCZOS = "box", "hamming", "lanczos"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return InterpolationMode
        return type(name, (), {"__module__": self.__name__})


def import_timm():
    """Return timm, with stand-ins for torchvision's modules where it is not installed.

    Raises:
        ModuleNotFoundError: where timm or PyTorch is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        for suffix in MODULES:
            name = f"torchvision{suffix}"
            module = sys.modules[name] = _Module(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__, module.__version__ = [], "0"
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    import timm

    return timm
