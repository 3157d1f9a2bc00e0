"""Trains a small network that survives the death of its node: `python train.py --epochs 12 --out outputs/checkpoints`.

What is written to ./outputs/checkpoints is copied away as it appears. An attempt that follows finds the newest of it in
`run.resume_path`, and goes on from there: weights, optimiser, random numbers, epoch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from alveary import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.0, help="how long an epoch takes at least")
    arguments = parser.parse_args()
    run = Run.get_context()
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    begin = 0
    if run.resume_path:
        newest = max(Path(run.resume_path).glob("epoch-*.pt"))
        state = torch.load(newest, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        begin = state["epoch"] + 1
        print(f"resumed after epoch {state['epoch']}", flush=True)
    folder = Path("outputs/checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(begin, arguments.epochs):
        for _ in range(20):
            inputs = torch.randn(64, 8)
            loss = torch.nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True).sin())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "random": torch.get_rng_state(), "epoch": epoch}
        # Whole or not at all: written beside, then renamed.
        torch.save(state, folder / ".writing.pt")
        (folder / ".writing.pt").replace(folder / f"epoch-{epoch:04}.pt")
        run.log("loss", loss.item(), step=epoch)
        print(f"epoch {epoch}: loss {loss.item():.9f}", flush=True)
        time.sleep(arguments.seconds)
    torch.save(model.state_dict(), "outputs/model.pt")


if __name__ == "__main__":
    main()
