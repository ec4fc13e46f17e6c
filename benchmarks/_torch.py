"""PyTorch's `clip_grad_norm_` and fused optimizers, over trees of the same shapes."""

from __future__ import annotations

import importlib
import time
from typing import Any

from _trees import Shapes

CLIP, BARE = "torch.clip_grad_norm_", "torch bare"
# OpenMP's threads wait awake for some milliseconds, on the cores that the next candidate needs.
CALM = 0.01


class TorchWorld:
    """Parameters with gradients, and their optimizer, for both steps in turn."""

    def __init__(self, shapes: Shapes, dtype: str, optimizer: str) -> None:
        self.torch = torch = importlib.import_module("torch")
        if optimizer == "muon":
            raise ValueError("PyTorch has no fused Muon")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = {"dtype": getattr(torch, dtype), "device": device}
        self.params = [0.02 * torch.randn(shape, **settings) for shape in shapes.values()]
        for p in self.params:
            p.requires_grad_()
            p.grad = 2 * torch.randn(p.shape, **settings)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        self.optimizer = kind(self.params, lr=1e-4, fused=True)
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None


class TorchJob:
    """A step of PyTorch's optimizer, with or without the clip, to time beside the others."""

    def __init__(self, name: str, world: TorchWorld) -> None:
        self.name, self.world = name, world

    def sample(self, calls: int) -> float:
        """The seconds per step of so many in a row."""
        world, clip = self.world, self.world.torch.nn.utils.clip_grad_norm_
        began = time.perf_counter()
        for _ in range(calls):
            if self.name == CLIP:
                clip(world.params, 1.0, foreach=True)
            world.optimizer.step()
        world.wait()
        took = (time.perf_counter() - began) / calls
        time.sleep(CALM)
        return took


def torch_jobs(shapes: Shapes, dtype: str, optimizer: str) -> list[Any]:
    """The two steps: without the clip and with it.

    Raises:
      ImportError: where PyTorch is not installed.
      RuntimeError, ValueError: where it has no such step.
    """
    world = TorchWorld(shapes, dtype, optimizer)
    jobs = [TorchJob(name, world) for name in (BARE, CLIP)]
    for job in jobs:
        job.sample(1)
    return jobs
