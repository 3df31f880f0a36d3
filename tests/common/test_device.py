"""Which device a rank takes. No GPU is needed: what PyTorch says of them is replaced."""

import pytest
import torch

from common import device
from common.errors import UserError


def test_each_of_several_ranks_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device._device("cuda:0", local=0) == torch.device("cuda:0")  # a single rank
    assert device._device("cuda:1", local=0) == torch.device("cuda:1")
    with pytest.raises(UserError, match="this machine has 2 CUDA devices"):
        device._device("cuda:2", local=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device._device("cuda", local=1) == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:0: got it for all of 2 ranks, wanted cuda"):
        device._device("cuda:0", local=1)
