"""Fine-tune ResNet-18 on a folder of pictures: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg.

Runs by itself (`python train.py --data FOLDER`) and as an Alveary run; then `run.log` goes to the platform.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from alveary import Run

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the weights were trained on


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--weights", default="IMAGENET1K_V1", help="torchvision weights of ResNet-18, a file, or 'none'")
    parser.add_argument("--feature-extract", action="store_true", help="train the last layer alone")
    parser.add_argument("--output_dir", default="./outputs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(weights: str, classes: int, feature_extract: bool) -> tuple[nn.Module, str]:
    """The network with a fresh last layer, and where its weights come from."""
    source = weights
    if weights == "none":
        network = models.resnet18(weights=None)
        source = "random"
    elif Path(weights).exists():
        network = models.resnet18(weights=None)
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    else:
        try:
            network = models.resnet18(weights=weights)
        except OSError as error:  # no internet: urllib's URLError is one
            warnings.warn(f"pretrained weights {weights} cannot be had ({error}); training from random weights", stacklevel=2)
            network = models.resnet18(weights=None)
            source = "random"
    if feature_extract:
        for parameter in network.parameters():
            parameter.requires_grad = False
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network, source


def loaders(folder: Path, batch_size: int) -> tuple[DataLoader, DataLoader, list[str]]:
    """Training and validation batches, and the names of the classes."""
    learn = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )
    check = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    train = datasets.ImageFolder(str(folder / "train"), learn)
    val = datasets.ImageFolder(str(folder / "val"), check)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size), train.classes


def epoch(model: nn.Module, batches: DataLoader, device: torch.device, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """One pass; trains with an optimizer, measures without. Returns mean loss and accuracy."""
    model.train(optimizer is not None)
    total, right, seen = 0.0, 0, 0
    criterion = nn.CrossEntropyLoss()
    with torch.set_grad_enabled(optimizer is not None):
        for pictures, labels in batches:
            pictures, labels = pictures.to(device), labels.to(device)
            outputs = model(pictures)
            loss = criterion(outputs, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item() * len(labels)
            right += int((outputs.argmax(1) == labels).sum())
            seen += len(labels)
    return total / seen, right / seen


def main() -> None:
    """Train, log, keep the best."""
    args = arguments()
    run = Run.get_context()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val, classes = loaders(Path(args.data), args.batch_size)
    model, source = build(args.weights, len(classes), args.feature_extract)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=args.momentum)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    out = Path(args.output_dir)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    run.log("lr", args.lr)
    run.log("momentum", args.momentum)
    print(f"{len(train.dataset)} pictures of {', '.join(classes)} on {device}, weights: {source}")  # type: ignore[arg-type]
    best = -math.inf
    for number in range(args.epochs):
        started = time.monotonic()
        train_loss, train_accuracy = epoch(model, train, device, optimizer)
        val_loss, val_accuracy = epoch(model, val, device, None)
        scheduler.step()
        run.log("train_loss", train_loss, step=number)
        run.log("train_acc", train_accuracy, step=number)
        run.log("val_loss", val_loss, step=number)
        run.log("val_acc", val_accuracy, step=number)
        print(
            f"epoch {number + 1}/{args.epochs}: train loss {train_loss:.4f} acc {train_accuracy:.3f}, "
            f"val loss {val_loss:.4f} acc {val_accuracy:.3f}, {time.monotonic() - started:.1f} s"
        )
        torch.save(
            {"epoch": number, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
            out / "checkpoints" / f"epoch-{number:03}.ckpt",
        )
        if val_accuracy > best:
            best = val_accuracy
            torch.save(model.to("cpu"), out / "model.pt")
            model.to(device)
        run.log("best_val_acc", best, step=number)
    (out / "labels.json").write_text(json.dumps(classes))
    print(f"best validation accuracy {best:.3f}")


if __name__ == "__main__":
    main()
