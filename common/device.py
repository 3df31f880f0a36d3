"""Where a stage runs: device, precision, ranks, memory."""

import contextlib
import datetime
import gc
import os
import re
import resource
from pathlib import Path

from common.errors import UserError  # before torch: Ctrl-C is quiet while that is loaded

# Threads that wait for each other spin for a moment, then sleep. By default they spin for long, and
# where another process takes a core two threads are 40 times slower than one (LOG.md). It is read
# when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# How many rows are kept changes from step to step: on a GPU, segments that can grow leave no gaps
# between blocks of many sizes. (PyTorch before 2.12 reads it under this name alone.)
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist

# Dense bf16, by whole words of the device's name; the first that fits.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def free_memory(device):
    """Give a GPU's memory back that nothing refers to: compiled modules lie in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _n_cpus():
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _device(name, local):
    """The device that `--device` means; on a GPU the one of this rank, `local`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not a device that the kit runs on; use cpu or cuda")
    several = n_ranks() > 1 and torch.cuda.device_count() > 1
    if device.type == "cuda" and device.index != local and several:
        raise UserError(
            f"--device {name}: got it for all of {n_ranks()} ranks, wanted cuda, of which each "
            f"takes its own"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; name "
            f"one of them, counted from 0, or start as many ranks"
        )
    return device


def n_ranks():
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Env:
    """`device`, `dtype` (of the forward pass), `rank` of `world` ranks (torchrun's), `main`.

    Precision: fp32 on CPU; on a GPU bf16 autocast over fp32 master weights (`--dtype auto`).
    Raises UserError where the device is not there.
    """

    def __init__(self, args):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = n_ranks()
        self.main = self.rank == 0
        self.patient = None  # a group of ranks that wait for long
        self.device = _device(args.device, local=int(os.environ.get("LOCAL_RANK", 0)))
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        if args.dtype != "auto":
            self.dtype = getattr(torch, args.dtype)
        if args.threads or self.world > 1:  # torchrun sets OMP_NUM_THREADS=1
            of_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
            torch.set_num_threads(args.threads or max(1, _n_cpus() // of_this_machine))
        if on_gpu:
            torch.cuda.set_device(self.device)
            # TF32 holds bf16 numbers exactly, so fp32 products of them lose nothing. fp32 would.
            exact = self.dtype == torch.float32
            torch.set_float32_matmul_precision("highest" if exact else "high")
        if self.world > 1 and not dist.is_initialized():
            if on_gpu:
                # gloo for what lies on the CPU: flags, paths, the parts of a training state.
                dist.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device)
            else:
                dist.init_process_group("gloo")

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def tensor(self, array):
        """A numpy array on the device; from pinned memory, so that the copy does not wait."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def total(self, tensor):
        """The sum of a tensor over all ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """Tensors of one shape from all ranks, as a list."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def interleave(self, tensor):
        """Equal (n, ...) tensors of all ranks as one (n * world, ...).

        Rank r's i-th stands at i * world + r.
        """
        return torch.stack(self.gather(tensor), dim=1).flatten(0, 1)

    def wait(self):
        """All ranks wait for the slowest, however long it takes."""
        if self.world > 1:
            dist.barrier(self._patient_group())

    def any_rank(self, *flags):
        """Of each flag: is it set on any rank? Every rank gets the same answers."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts, group=self._patient_group())
        return [count > 0 for count in counts.tolist()]

    def count(self, numbers):
        """The sum of whole numbers over all ranks. The device is not asked."""
        if self.world == 1:
            return sum(numbers)
        total = torch.tensor(sum(numbers), dtype=torch.int64)
        dist.all_reduce(total, group=self._patient_group())
        return total.item()

    def _patient_group(self):
        if self.patient is None:
            self.patient = self.new_patient_group()
        return self.patient

    def new_patient_group(self):
        """All ranks, on the CPU. All of them must call it.

        A download or a large file may outlast what collectives on a GPU are given (30 minutes).
        """
        return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))

    def main_first(self, function):
        """function() on every rank, on rank 0 first: it downloads, the others find its copy."""
        out = function() if self.main else None
        self.wait()
        return out if self.main else function()

    def from_main(self, function):
        """The result of `function`, called on rank 0 alone, on every rank."""
        box = [function() if self.main else None]
        self.wait()
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mfu(self, flops_per_s):
        """Model FLOPs utilisation: the share (0..1) of the peak of all ranks' devices.

        None where that is not known, as on a CPU.
        """
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        for part, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return flops_per_s / (peak * self.world)
        return None

    def peak_memory(self, reset=False):
        """Peak memory in bytes since the last reset: allocated on the GPU, resident on the CPU."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        try:
            if reset:
                Path("/proc/self/clear_refs").write_text("5")
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):  # not Linux, or not allowed: the peak of the whole process
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
