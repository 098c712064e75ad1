"""Decoding with parameters that are sharded: torch's FSDP2, one gloo process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apt_core.modeling import ModelBuilder


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [{}, {"tva": {"s": 2}}, {"attention_name": "mha"}], ids=str)
def test_a_sharded_model_decodes_as_a_whole_one(mesh, settings):
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "max_seq_len": 16}
    model = ModelBuilder({"model": {**sizes, **settings}}).build_model().eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        caches = model.create_caches(10)
        pieces = [model(piece, caches=caches).logits for piece in ids.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
