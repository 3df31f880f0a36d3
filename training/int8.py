"""torchao's 8-bit AdamW (`--moments int8`): some 2 bytes a parameter for both moments, not 8.

A moment is kept as a code of 8 bits for each number and a scale for each block of them (Dettmers
and others, 2021, arXiv 2110.02861). Codes, scales and the arithmetic in fp32 are torchao's. Ours is
where blocks lie: within a row of a matrix, so that they are the same on any number of ranks.
"""

import contextlib
import logging

import torch
from torch.distributed.tensor import DTensor

from training.moments import MOMENTS, block_size

logging.disable(logging.WARNING)  # torchao names each GPU kernel that it has none of
try:
    from torchao.optim import AdamW8bit
finally:
    logging.disable(logging.NOTSET)


class Int8AdamW(AdamW8bit):
    """AdamW8bit on the terms of the kit: learning rates are numbers, states are plain tensors.

    `compiled`: torchao compiles the update of each shape of parameter. Without, it is the same
    arithmetic, operation by operation.
    """

    def __init__(self, groups, lr, betas, compiled):
        super().__init__(groups, lr=lr, betas=betas)
        self.compiled = compiled
        for group in self.param_groups:
            group["lr"] = lr  # torchao has made a tensor of it

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        rates = [group["lr"] for group in self.param_groups]
        how = contextlib.nullcontext()
        if not self.compiled:
            how = torch.compiler.set_stance("force_eager")
        with how:
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"])
            super().step()
        for group, rate in zip(self.param_groups, rates):
            group["lr"] = rate

    def _new_buffer(self, p, signed):
        """A moment of zeros, in codes where its rows have blocks; torchao calls this."""
        here = p.to_local() if isinstance(p, DTensor) else p
        block = block_size(p.shape)
        if block is None or here.numel() == 0:  # of a few rows a rank may have none
            zeros = torch.zeros_like(here)
        else:
            zeros = self._subclass_zeros(here, signed, block)
        return shared_out_as(p, zeros, p.shape)

    # ----------------------------------------------------------------------------------------------
    # states

    def begin(self):
        """Moments of zeros for every parameter, as the first step makes them."""
        for p in self._parameters():
            self.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": self._new_buffer(p, True),
                "exp_avg_sq": self._new_buffer(p, False),
            }

    def tensors_of(self, p):
        """What is kept of a parameter, {name: tensor}: the live ones, and plain or a DTensor.

        Of a moment in codes `NAME.codes`, of the parameter's shape, and `NAME.scales`, one row for
        each of its rows. A rank's share of both goes by rows, as the parameter's does.
        """
        found = {"step": self.state[p]["step"]}
        block = block_size(p.shape)
        for name in MOMENTS:
            moment = self.state[p][name]
            if block is None:
                found[name] = moment
                continue
            here = moment.to_local() if isinstance(moment, DTensor) else moment
            rows, columns = here.shape
            scales = torch.zeros(0, columns // block, device=here.device)
            codes = torch.zeros(0, columns, dtype=torch.uint8, device=here.device)
            if rows:
                codes = here.codes
                scales = here.scale.view(rows, -1)
            found[f"{name}.codes"] = shared_out_as(p, codes, p.shape)
            shape = torch.Size((len(p), columns // block))
            found[f"{name}.scales"] = shared_out_as(p, scales, shape)
        return found

    def state_dict(self):
        """With plain tensors: whoever reads a state needs no torchao."""
        saved = super().state_dict()
        parameters = enumerate(self._parameters())
        saved["state"] = {i: self.tensors_of(p) for i, p in parameters if p in self.state}
        return saved

    def load_state_dict(self, saved):
        super().load_state_dict({**saved, "state": {}})
        self.begin()
        for i, p in enumerate(self._parameters()):
            for name, tensor in self.tensors_of(p).items():
                tensor.copy_(saved["state"][i][name])

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]


def shared_out_as(p, here, shape):
    """A rank's rows of a tensor of `shape` as a DTensor, where the parameter is one."""
    if not isinstance(p, DTensor):
        return here
    stride = (shape[1], 1) if len(shape) == 2 else (1,)
    return DTensor.from_local(
        here, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride
    )
