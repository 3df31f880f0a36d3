"""The table of tools.gpu_check."""

from tools.gpu_check.cases import RANKS, TRAIN


def line_of(result):
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    return ", ".join(f"{key} {shown(key, value)}" for key, value in result.items())


def shown(key, value):
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if key == "mfu":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown(known):
    """Two tables: training steps, and everything else."""
    cases = known["cases"]
    text = [
        f"{known['machine']}, torch {known['torch']}, {known['preset']}, {known['dtype']}: "
        f"T {known['seq_len']:,}, {known['batch_size']} windows, k {known['k']:g}, "
        f"median of {known['steps']} steps",
        "",
        "| step | tokens/s | of CLM | MFU | peak memory | planned | graphs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = cases.get("CLM", {}).get("tok_per_s")
    for case in [*TRAIN, *RANKS]:
        result = cases.get(case)
        if result is None:
            continue
        if "failed" in result:
            text.append(f"| {case} | failed: {result['failed']} |" + " |" * 5)
            continue
        keys = ("mfu", "peak_memory_bytes", "planned_bytes", "graphs")
        cells = [shown(key, result.get(key)) for key in keys]
        of_base = f"{result['tok_per_s'] / base:.2f}" if base else "-"
        text.append(f"| {case} | {result['tok_per_s']:,} | {of_base} | " + " | ".join(cells) + " |")
    text += ["", "| check | result |", "|---|---|"]
    checks = [case for case in cases if case not in (*TRAIN, *RANKS)]
    text += [f"| {case} | {line_of(cases[case])} |" for case in checks]
    return "\n".join(text) + "\n"
