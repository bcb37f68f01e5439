"""Chapter 6: your own training loop, on several devices, with Hugging Face accelerate.

What `graphopt.recover` does in one call, written out: lift the pruned graph, attach quantizers, train against the
original, lower. Run it as `python examples/06_accelerate.py`, on several GPUs as
`accelerate launch --num_processes 2 examples/06_accelerate.py`. On CPUs that starts one process (accelerate 1.15);
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/06_accelerate.py` starts two.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import graphopt
from graphopt.train.distillation import distillation_loss
from graphopt.train.fake_quant import FakeQuant

EPOCHS = 8


def trained_network(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A small convolutional network, [batch, 1, 8, 8] to logits [batch, 10], trained for some seconds."""
    torch.manual_seed(0)  # every process trains the same one
    module = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()
    return module.eval()


def main() -> None:
    """Train, prune, recover with quantizers, and print the accuracy after each."""
    accelerator = Accelerator()
    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(digits)
    training, test = slice(0, 1200), slice(1200, None)
    module = trained_network(images[training], labels[training])
    model = graphopt.trace(module, (images[:2],), dynamic_shapes=({0: "batch"},))
    groups = [group for group in graphopt.channel_groups(model) if group.prunable]
    smaller = graphopt.remove_channels(model, {group.name: range(group.units // 2) for group in groups})

    teacher = graphopt.lift(model).to(accelerator.device)
    student = graphopt.lift(smaller)
    quantizers = FakeQuant.for_linear(smaller)  # weights of 7 bits, activations of 8
    student.attach("quantizers", quantizers)
    quantizers.prepare(student, [[images[training][:256]]])

    loader = torch.utils.data.DataLoader(images[training], batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    prepared, optimizer, loader, schedule = accelerator.prepare(student, optimizer, loader, schedule)
    prepared.train()
    for _ in range(EPOCHS):
        for batch in loader:
            with torch.no_grad():
                wanted = teacher(batch)
            loss = distillation_loss(prepared(batch), wanted)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return

    recovered = graphopt.lower(prepared, smaller)
    print(f"trained in {accelerator.num_processes} process(es)")
    for name, graph in (("original", model), ("half of the channels", smaller), ("recovered in int8", recovered)):
        session = onnxruntime.InferenceSession(
            ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (logits,) = session.run(None, {session.get_inputs()[0].name: images[test].numpy()})
        print(f"{name:20} {(logits.argmax(axis=1) == labels[test].numpy()).mean():.1%}")


if __name__ == "__main__":
    main()
