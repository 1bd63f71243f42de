"""Measure this machine: seconds of one eager forward pass of timm's gcvit_xxtiny.

    python tools/reproduce/yardstick.py

16 images of 224 px in float32, on all of the CPU's cores: the median of five passes after one
that is left out. A duration divided by it can be compared with one from another machine, or
from another day. Needs timm and PyTorch.
"""

import statistics
import time

from torchvision_stand_in import import_timm


def seconds(passes=5):
    """Return the median duration of so many forward passes."""
    timm = import_timm()
    import torch

    model = timm.create_model("gcvit_xxtiny").eval()
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    took = []
    with torch.inference_mode():
        for _ in range(passes + 1):
            began = time.perf_counter()
            model(images)
            took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


if __name__ == "__main__":
    print(f"{seconds():.3f}")
