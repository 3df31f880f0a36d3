"""tools.plan's memory beside the measured peak of a training step, of models of 25M to 200M."""

import argparse

from tools.bench.rows import OURS, PRESETS, config_of
from tools.bench.train import memory_in_own_process
from tools.compare import table
from tools.plan.memory import counts, memory

CASES = [  # preset, windows, tokens of each, row, checkpointing
    ("cpu-30m", 4, 512, "slm_kept", False),
    ("cpu-30m", 4, 512, "slm_kept", True),
    ("cpu-30m", 4, 512, "slm_lean", False),
    ("cpu-130m", 2, 256, "slm_kept", False),
    ("cpu-130m", 2, 256, "slm_lean", True),
    ("cpu-200m", 2, 256, "slm_pruned", False),
    ("cpu-200m", 2, 256, "slm_kept", True),
]


def bench_memory(args, env):
    """{case: {planned_bytes, peak_memory_bytes}}; in fp32, on a CPU or as it is on a GPU."""
    found = {}
    rows = [["step", "parameters", "windows", "planned", "measured", "planned / measured"]]
    for preset, windows, seq_len, row, checkpointing in CASES:
        case = argparse.Namespace(**vars(args))
        case.preset = preset
        case.batch_size = windows
        case.seq_len = seq_len
        case.vocab_size = PRESETS[preset].vocab_size
        case.checkpointing = checkpointing
        planned, measured = compared(row, case, bf16=env.dtype.itemsize == 2)
        name = row.replace("slm_", "SLM, ") + (", checkpointing" if checkpointing else "")
        shape = f"{windows} x {seq_len}"
        found[f"{preset}, {shape}: {name}"] = {
            "planned_bytes": planned,
            "peak_memory_bytes": measured,
        }
        cells = [f"{planned / 1e9:.2f} GB", f"{measured / 1e9:.2f} GB", f"{planned / measured:.2f}"]
        rows.append([name, f"{counts(config_of(case))[0] / 1e6:.0f}M", shape, *cells])
        print(", ".join(rows[-1]), flush=True)
    print(table(rows))
    return found


def compared(row, args, bf16):
    """(planned, measured) bytes of a row's step."""
    head, backward, selective = OURS[row]
    _, planned = memory(
        config_of(args),
        args.batch_size,
        args.seq_len,
        bf16=bf16,
        head=head,
        backward=backward,
        k=args.k if selective else 1.0,
        checkpointing=args.checkpointing,
    )
    return planned, memory_in_own_process(row, args)["peak_memory_bytes"]
