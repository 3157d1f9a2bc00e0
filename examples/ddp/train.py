"""Data-parallel training with torchrun: `python -m torch.distributed.run --nproc-per-node=2 train.py`.

gloo on CPUs, nccl on GPUs. Each rank takes its part of every batch; the gradients are averaged, so that the loss is that
of one process with the whole batch. Rank 0 logs, and stores checkpoints that a next attempt goes on from.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from alveary import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together")
    arguments = parser.parse_args()
    run = Run.get_context()
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    torch.manual_seed(3)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.Generator().manual_seed(5)  # the same batches whatever the number of ranks
    begin = 0
    if run.resume_path:
        state = torch.load(Path(run.resume_path, "last.pt"), weights_only=True, map_location=device)
        model.module.load_state_dict(state["model"])
        data.set_state(state["data"].cpu())
        begin = state["step"] + 1
    folder = Path("outputs/checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(begin, arguments.steps):
        batch = torch.randn(arguments.batch, 8, generator=data)
        mine = batch[rank::world].to(device)
        loss = torch.nn.functional.mse_loss(model(mine), mine.sum(dim=1, keepdim=True).sin())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        dist.all_reduce(loss)
        if rank == 0:
            run.log("loss", loss.item() / world, step=step)
            if step % 20 == 19:
                torch.save({"model": model.module.state_dict(), "data": data.get_state(), "step": step}, folder / ".last.pt")
                (folder / ".last.pt").replace(folder / "last.pt")
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everybody = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everybody, weights)
    if rank == 0:
        alike = all(torch.equal(weights, other) for other in everybody)
        print(f"{world} ranks, loss {loss.item() / world:.6f}, weights alike: {alike}", flush=True)
        torch.save(model.module.state_dict(), "outputs/model.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
