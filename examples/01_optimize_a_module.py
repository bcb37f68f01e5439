"""Chapter 1: a torch module in, a faster ONNX file and the proof out.

The module is traced, the export is compared with the module at two batch sizes, exact passes fold BatchNormalization
away, and int8 is tried. Nothing is kept that is wrong or slower; the report says what happened to each step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import graphopt

torch.manual_seed(0)
module = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()
images = torch.randn(4, 3, 32, 32)

result = graphopt.optimize(module, (images,), dynamic_shapes=({0: "batch"},), quiet=True)
print(result.report)

with tempfile.TemporaryDirectory() as folder:
    path = result.save(Path(folder) / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for batch in (1, 7):  # the batch stayed dynamic
        x = torch.randn(batch, 3, 32, 32)
        difference = session.run(None, {name: x.numpy()})[0] - module(x).detach().numpy()
        print(f"batch {batch}: largest difference to the module {np.abs(difference).max():.4f}")
