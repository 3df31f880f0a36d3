"""tools.gpu_check on a CPU: the path that a GPU will take, with tiny shapes."""

import json
import subprocess

import pytest

from common.errors import UserError
from conftest import HANGS, ROOT
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import cases, stages, table

FLAGS = ["--preset", "demo", "--device", "cpu", "--threads", "1", "--steps", "1", "--seq-len", "16"]


def test_what_is_known_is_not_measured_again_and_failures_are(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case, argv, out):
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


def test_on_one_gpu_there_is_one_way_and_on_four_there_are_four():
    assert list(stages.ways(1)) == ["stages: one"]
    assert stages.ways(3).keys() == {"stages: one", "stages: ddp", "stages: fsdp"}
    assert stages.ways(4)["stages: hsdp"] == (4, "--parallel fsdp --shard-size 2")


def test_a_stage_that_fails_is_named_with_what_it_said(tmp_path):
    args = gpu_check.arguments(FLAGS)
    with pytest.raises(UserError, match="score.py on 1 ranks: error: .*nowhere"):
        stages.run(args, f"score.py --model nowhere --data nowhere --out {tmp_path}/r.bin", 1)


CUDA_ERROR = """\
W1128 12:00:00 torch/distributed/run.py: Setting OMP_NUM_THREADS
[rank1]: Traceback (most recent call last):
[rank1]:   raise RuntimeError("an Error that is only quoted")
[rank1]: torch.AcceleratorError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.
    traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


def test_the_cause_is_found_in_what_many_processes_said():
    assert stages.cause(CUDA_ERROR) == (
        "[rank1]: torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
    )
    assert stages.cause("Killed\n\n") == "Killed" and stages.cause("") == "it said nothing"


@pytest.mark.slow
def test_of_two_ranks_that_fail_the_table_has_the_cause_and_a_log_the_rest(tmp_path, monkeypatch):
    # A case that no machine knows: each rank ends in a KeyError, and torchrun says more behind it.
    monkeypatch.setattr(gpu_check, "RANKS", ["no such case"])
    result = gpu_check.in_own_process("no such case", FLAGS, tmp_path)
    assert "KeyError" in result["failed"] and result["exit_code"] != 0
    log = (tmp_path / "no-such-case.log").read_text()
    assert "elastic" in log and str(tmp_path / "no-such-case.log") in result["failed"]


def stopped_behind_step_7(words, log):
    """In place of a signal from outside, which comes when it comes: every rank sends its own."""
    place = next(i for i, word in enumerate(words) if word.endswith("train_slm.py"))
    point = ["--send", "SIGTERM", "call:data:Loader.micro_batches:7", "train_slm.py"]
    words = [*words[:place], str(ROOT / "tests/killed.py"), *point, *words[place + 1 :]]
    assert subprocess.run(words, capture_output=True, timeout=HANGS).returncode != 0


@pytest.mark.slow
def test_the_stages_agree_and_go_on_after_a_stop(tmp_path, monkeypatch):
    some = {name: stages.METHODS[name] for name in ("batch", "documents")}
    monkeypatch.setattr(stages, "METHODS", some)
    monkeypatch.setattr(stages, "LONG", 12)
    monkeypatch.setattr(stages, "stop", stopped_behind_step_7)
    args = gpu_check.arguments(["--out", str(tmp_path / "g"), *FLAGS])
    alone, spread = (stages.stages_case(f"stages: {way}", args, None) for way in ("one", "fsdp"))
    assert 0 <= spread["furthest"] < 1e-5 and alone["batch"] != alone["documents"]
    for result in (alone, spread):
        assert (result["stopped_at"], result["steps"]) == (7, 12)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "numbers", "ranks"])
def test_every_case_runs(tmp_path, part):
    gpu_check.main(["--out", str(tmp_path / "g"), "--part", part, *FLAGS])
    known = json.loads((tmp_path / "g/gpu_check.json").read_text())["cases"]
    failed = {case: result for case, result in known.items() if "failed" in result}
    assert not failed and list(known) == gpu_check.cases_of(
        gpu_check.arguments(["--part", part, *FLAGS])
    )
    for case in set(known).intersection([*cases.TRAIN, *cases.RANKS]):
        assert known[case]["tok_per_s"] > 0 and known[case]["peak_memory_bytes"] > 0
    if part == "numbers":
        assert known["documents"]["largest_nats"] == known["documents"]["gradients_off"] == 0.0
        assert known["generate"]["new_tokens"] == 4 * 64
