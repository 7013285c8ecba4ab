"""Train the example classifier on digits in scenes and write its weights.

    python -m bench.train_digits export/digits.pt

Deterministic for a given machine and thread count. Prints the accuracy on the test split, whose
photographs' parts and digits the training never saw.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn

from ccam_deploy.examples.digits import DigitsNet
from ccam_deploy.examples.scenes import Split, make_scenes

MEAN, STD = 0.45, 0.25


def load(split: Split, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make scenes: images [count, 3, 96, 96] uint8 and classes [count]."""
    scenes = make_scenes(split, count, seed)
    images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
    return torch.from_numpy(images), torch.tensor([scene.digits[0] for scene in scenes])


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, stream: torch.Generator) -> Tensor:
    """Shift each batch by a few pixels and change its gain and offset image by image."""
    rows, columns = torch.randint(-6, 7, (2,), generator=stream).tolist()
    images = images.roll((rows, columns), (2, 3))
    gain = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=stream)
    offset = 0.3 * (torch.rand(len(images), 3, 1, 1, generator=stream) - 0.5)
    return images * gain + offset


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(images), 250):
        part = slice(start, start + 250)
        hits += int((model(normalise(images[part])).argmax(1) == classes[part]).sum())
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stream = torch.Generator().manual_seed(0)
    images, classes = load("train", arguments.images)
    test_images, test_classes = load("test", 2000)
    model = DigitsNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = arguments.epochs * (len(images) // arguments.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(arguments.epochs):
        started = time.perf_counter()
        model.train()
        order = torch.randperm(len(images), generator=stream)
        for step in range(len(images) // arguments.batch):
            rows = order[step * arguments.batch : (step + 1) * arguments.batch]
            loss = loss_of(model(augment(normalise(images[rows]), stream)), classes[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        reached = accuracy(model, test_images, test_classes)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}: test accuracy {reached:.3f}, {seconds:.0f} s", flush=True)
        state = {
            name: value.contiguous().half() if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        torch.save(state, arguments.output)


if __name__ == "__main__":
    main()
