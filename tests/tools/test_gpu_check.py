"""tools.gpu_check on a CPU: the path that a GPU will take, with tiny shapes."""

import json

import pytest

from common.errors import UserError
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import table

FLAGS = ["--preset", "demo", "--device", "cpu", "--threads", "1", "--steps", "1", "--seq-len", "16"]


def test_what_is_known_is_not_measured_again_and_failures_are(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case, argv):
        asked.append(case)
        if case == "SLM, exact" and asked.count(case) == 1:
            return {"failed": "CUDA out of memory"}
        return {"tok_per_s": 1000, "mfu": 0.5, "peak_memory_bytes": 10**9, "graphs": 3}

    monkeypatch.setattr(gpu_check, "in_own_process", measured)
    argv = ["--out", str(tmp_path / "g"), "--part", "train", *FLAGS]
    gpu_check.main(argv)
    assert (
        "| SLM, exact | failed: CUDA out of memory |" in (tmp_path / "g/gpu_check.md").read_text()
    )
    gpu_check.main(argv)
    assert asked.count("SLM, exact") == 2 and asked.count("CLM") == 1
    text = (tmp_path / "g/gpu_check.md").read_text()
    assert "| CLM | 1,000 | 1.00 | 50.0% | 1.00 GB | - | 3 |" in text and "failed" not in text
    with pytest.raises(UserError, match=r"another setting \(k\); name another --out"):
        gpu_check.main([*argv, "--k", "0.5"])


def test_a_table_without_the_baseline():
    known = {"machine": "m", "torch": "2", "preset": "demo", "dtype": "float32", "seq_len": 16}
    known |= {"batch_size": 1, "steps": 1, "k": 0.6, "cases": {"ddp": {"tok_per_s": 5}}}
    assert "| ddp | 5 | - | - | - | - | - |" in table.markdown(known)


@pytest.mark.slow
def test_every_case_runs(tmp_path):
    gpu_check.main(["--out", str(tmp_path / "g"), *FLAGS])
    known = json.loads((tmp_path / "g/gpu_check.json").read_text())["cases"]
    failed = {case: result for case, result in known.items() if "failed" in result}
    assert not failed and len(known) == 14
    for case in ("CLM", "SLM, pruned", "ddp", "fsdp"):
        assert known[case]["tok_per_s"] > 0 and known[case]["peak_memory_bytes"] > 0
    assert known["documents"]["largest_nats"] == known["documents"]["gradients_off"] == 0.0
    assert known["generate"]["new_tokens"] == 4 * 64
