"""Data-parallel training with Horovod over MPI: `MpiConfiguration()` starts it with mpirun, on as many nodes as are asked for.

Each rank takes its part of every batch, and Horovod averages the gradients with an all-reduce between the nodes: the loss
is that of one process with the whole batch. Rank 0 logs and stores the model.
"""

from __future__ import annotations

import argparse
import os

import horovod.torch as hvd
import torch

from alveary import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together")
    arguments = parser.parse_args()
    run = Run.get_context()
    hvd.init()
    rank, world = hvd.rank(), hvd.size()
    if torch.cuda.is_available():
        torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(3 + rank)  # different at first: the broadcast makes them alike
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimiser, root_rank=0)
    optimiser = hvd.DistributedOptimizer(optimiser, named_parameters=model.named_parameters())
    data = torch.Generator().manual_seed(5)  # the same batches whatever the number of ranks
    total = torch.zeros(())
    for step in range(arguments.steps):
        batch = torch.randn(arguments.batch, 8, generator=data)
        mine = batch[rank::world].to(device)
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(model(mine), mine.sum(dim=1, keepdim=True).sin())
        loss.backward()
        optimiser.step()
        total = hvd.allreduce(loss.detach(), name="loss")
        if rank == 0:
            run.log("loss", total.item(), step=step)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
    everybody = hvd.allgather(weights.unsqueeze(0), name="weights")
    if rank == 0:
        alike = all(torch.equal(weights, other) for other in everybody)
        nodes = os.environ.get("ALVEARY_NODE_COUNT", "1")
        print(f"{world} ranks on {nodes} nodes, loss {total.item():.6f}, weights alike: {alike}", flush=True)
        torch.save(model.state_dict(), "outputs/model.pt")


if __name__ == "__main__":
    main()
