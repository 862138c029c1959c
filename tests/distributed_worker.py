"""One process of `test_distributed.py`: trains its share of a batch under DDP or FSDP2, and saves the adapter."""

import sys

import torch
import torch.distributed as dist
from conftest import make_dit, randomise
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from difffit_peft import DiffFitConfig


def train(wrap, rank: int = 0, world: int = 1):
    model = get_peft_model(make_dit(), DiffFitConfig(num_classes=3))
    randomise(model)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 4, 8, 8, generator=generator)[rank::world]
        timestep = torch.randint(1000, (4,), generator=generator)[rank::world]
        labels = torch.tensor([0, 2, 1000, 1])[rank::world]
        wrapped(x, timestep=timestep, class_labels=labels).sample.square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return model


def shard(model):
    for block in model.base_model.model.transformer_blocks:
        fully_shard(block)
    return fully_shard(model)


if __name__ == "__main__":
    how, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = train(DistributedDataParallel if how == "ddp" else shard, dist.get_rank(), dist.get_world_size())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    dist.barrier()  # a process that leaves first aborts the other
    dist.destroy_process_group()
