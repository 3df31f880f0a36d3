"""tools.plan: against the paper's hours, against counting by hand, and against measured memory."""

from dataclasses import replace

import pytest

from common.errors import UserError
from conftest import write_set
from model import Config
from tools.bench import __main__ as bench
from tools.bench import memory as bench_memory
from tools.plan import __main__ as plan
from tools.plan.memory import counts, memory, run_step, step_bytes
from tools.plan.recipe import commands_of
from tools.plan.stages import MISTRAL, TINYLLAMA, Plan, flops_per_token

TINY = "TinyLlama/TinyLlama_v1.1"
LARGE = "mistralai/Mistral-7B-v0.1"
TRAIN = (
    "train_slm.py --init {} --data d --ref-loss r.bin --k 0.6 --out o --seq-len {} --batch-size {} "
    "--micro-batch-size {} {}"
)


def planned(command, gpu="h100", n_gpus=32, tokens=15e9, **options):
    made = Plan(gpu, n_gpus, tokens={"d": int(tokens)}, **options)
    made.add(command.split())
    return made.rows[-1]


def test_shapes_have_the_published_numbers_of_parameters():
    assert counts(TINYLLAMA)[0] == 1_100_048_384
    assert counts(MISTRAL)[0] == 7_241_732_096


@pytest.mark.parametrize(
    "parameters, tokens, hours, mfu",
    [  # PAPER.md: on 32 H100
        (1.1e9, 15e9, 3.5, 0.248),
        (1.1e9, 50e9, 12, 0.241),
        (7.24e9, 15e9, 18, 0.318),
        (1.1e9, 80e9, 19, 0.244),
    ],
)
def test_the_papers_hours_as_mfu(parameters, tokens, hours, mfu):
    """6 N D over GPU seconds times 989 TFLOP/s is the MFU; planning at it gives the hours back.

    Attention is counted on both sides.
    """
    assert 6 * parameters * tokens / (32 * hours * 3600 * 989e12) == pytest.approx(mfu, abs=0.0006)
    name, config, seq_len = (TINY, TINYLLAMA, 2048)
    if parameters > 2e9:
        name, config, seq_len = (LARGE, MISTRAL, 4096)
    with_attention = mfu * flops_per_token(config, seq_len) / (6 * parameters)
    command = TRAIN.format(name, seq_len, 2**20 // seq_len, 1, "--parallel fsdp")
    row = planned(command, tokens=tokens, mfu=with_attention)
    assert row["hours"] == pytest.approx(hours, rel=0.01)
    assert row["steps"] == -(-int(tokens) // 2**20)


def test_flops_by_hand():
    by_hand = 6 * (1.1000e9 - 65.5e6) + 12 * 22 * 2048 * 2048
    assert flops_per_token(TINYLLAMA, 2048) == pytest.approx(by_hand, rel=1e-3)
    windowed = replace(TINYLLAMA, sliding_window=512)  # a token sees 512 others, not 2,048
    assert flops_per_token(windowed, 2048) == flops_per_token(TINYLLAMA, 512)
    assert flops_per_token(windowed, 256) == flops_per_token(TINYLLAMA, 256)
    scoring = f"score.py --model {TINY} --data d --out r.bin --seq-len 2048"
    scored = planned(scoring, tokens=3e9, mfu=0.5)
    trained = planned(TRAIN.format(TINY, 2048, 512, 1, ""), tokens=3e9, mfu=0.5)
    assert scored["hours"] == pytest.approx(trained["hours"] / 3, rel=1e-3)
    assert scored["disk"] == 6e9
    short = planned(f"{scoring} --context 512", tokens=3e9, mfu=0.5)
    twice = 2 * flops_per_token(TINYLLAMA, 512) / flops_per_token(TINYLLAMA, 2048)
    assert short["hours"] == pytest.approx(scored["hours"] * twice)


def test_a_batch_that_is_ranked_as_a_whole_has_a_forward_pass_more():
    def hours(size, scope):
        return planned(TRAIN.format(TINY, 2048, 32, size, f"--scope {scope}"))["hours"]

    assert hours(1, "batch") == pytest.approx(hours(1, "micro") * 4 / 3)
    assert hours(1, "batch --score ref_loss") == hours(1, "micro")  # known before any pass


def test_static_parts_and_what_ranks_share():
    n = counts(TINYLLAMA)[0]
    alone, _ = memory(TINYLLAMA, 1, 2048)
    static = {"weights": 4 * n, "gradients": 4 * n, "optimiser": 8 * n, "ranks": 0}
    assert {part: alone[part] for part in static} == static
    light, _ = memory(TINYLLAMA, 1, 2048, moments="bfloat16")
    assert light == {**alone, "optimiser": 4 * n}
    ddp, peak_ddp = memory(TINYLLAMA, 1, 2048, ranks=8)
    fsdp, peak = memory(TINYLLAMA, 1, 2048, ranks=8, parallel="fsdp")
    assert ddp["ranks"] == 0
    assert sum(fsdp[part] for part in ("weights", "gradients", "optimiser")) == 2 * n
    _, outer, block = counts(TINYLLAMA)
    assert fsdp["ranks"] == 2 * (outer + 2 * block) + 6 * outer  # bf16 copies, one reduction
    assert fsdp["cast"] == 0
    never, _ = memory(TINYLLAMA, 1, 2048, ranks=8, parallel="fsdp", reshard="never")
    assert never == {**fsdp, "ranks": fsdp["ranks"] + 2 * 20 * block}
    assert peak < peak_ddp - 10 * n  # DDP holds 16 N of states, and casts


@pytest.mark.slow
def test_where_no_count_is_known_before_the_losses_logits_lie_there():
    """Of a weight every row may count, and the head holds all logits, as for a k below 1."""
    command = TRAIN.format(TINY, 2048, 128, 4, "").replace("--k 0.6", "{}")
    plain, chosen, weighed = (
        planned(command.format(how))["memory"]["head"]
        for how in ("--k 1.0", "--k 0.6", "--score mile --head kept")
    )
    assert chosen - plain > 0.7e9 and weighed >= chosen


def test_a_forward_pass_in_float32_is_planned_as_one():
    command = TRAIN.format(TINY, 2048, 512, 4, "--dtype {}")
    bf16, fp32 = (planned(command.format(dtype)) for dtype in ("bfloat16", "float32"))
    assert fp32["memory"]["cast"] == 0
    assert fp32["memory"]["activations"] > 1.4 * bf16["memory"]["activations"]


@pytest.mark.slow
def test_depth_is_a_line():
    """What two small depths give for five layers is what five layers give."""
    five = Config(1000, 64, 160, 5, 4, 2)
    for settings in (
        (2, 32, 0.6, "kept", "exact", False, False, True, False),
        (2, 32, 1.0, "lean", "exact", True, True, True, True),
        (2, 32, 1.0, "kept", "exact", False, True, False, False),
    ):
        trunk, *peaks = run_step(five, *settings)
        told = step_bytes(five, *settings)
        assert told[0] == trunk
        assert told[2] == pytest.approx(max(peaks), rel=0.02)


@pytest.mark.slow
def test_what_does_not_fit_gets_the_smallest_change():
    row = planned(TRAIN.format(TINY, 2048, 512, 2, ""), gpu="4090", n_gpus=1)
    assert not row["fits"]
    assert row["change"] == "--micro-batch-size 1"
    row = planned(TRAIN.format(TINY, 4096, 512, 2, ""), gpu="4090", n_gpus=1)
    assert not row["fits"]
    assert row["change"] == "--checkpointing"
    again = planned(TRAIN.format(TINY, 4096, 512, 2, row["change"]), gpu="4090", n_gpus=1)
    assert again["fits"]
    assert again["hours"] == pytest.approx(row["hours"] * 4 / 3)
    large = planned(TRAIN.format(LARGE, 4096, 256, 1, ""), n_gpus=8)
    assert not large["fits"]
    assert large["change"] == "--parallel fsdp"
    alone = planned(TRAIN.format(LARGE, 4096, 256, 1, ""), gpu="4090", n_gpus=1)
    assert "more GPUs" in alone["change"]
    assert "87 GB" in alone["change"]


@pytest.mark.parametrize(
    "command, message",
    [
        (TRAIN.format(TINY, 2048, 500, 1, ""), "not shared out evenly"),
        (f"train_slm.py --init {TINY} --data e --out o", "--tokens e=N"),
        ("train_slm.py --no-such-flag 1", "no-such-flag"),
        ("train_ref.py --data d", "wanted a --init"),
        ("score.py --data d", "wanted a --model"),
        ("train_ref.py --data d --init scratch --batch-size 0", "--batch-size: got 0"),
        ("train_ref.py --data d --init scratch --n-head 0", "--n-head: got 0"),
    ],
)
def test_refused_in_one_line(command, message, capsys):
    with pytest.raises(UserError, match=message):
        planned(command)


def test_what_is_there_says_how_large_it_is(vocabulary, tmp_path):
    """The vocabulary of a model from scratch, and the tokens of a set that --max-tokens caps."""
    data = write_set(tmp_path / "s", vocabulary, 5000)
    scratch = f"train_ref.py --data {data.folder} --init scratch --epochs 1 --out o"
    row = planned(scratch, n_gpus=1)
    assert row["config"].vocab_size == vocabulary.n_vocab
    made = Plan("h100", 1)
    made.add(f"prepare.py --source x --max-tokens 9000 --out {data.folder}".split())
    assert made.rows[-1]["tokens"] == 5000


def test_a_recipe_is_read_without_running(tmp_path, capsys):
    recipe = tmp_path / "r.sh"
    recipe.write_text(
        """[ -n "$PLAN" ] || exit 1
echo "$ python prepare.py --source hf:a/b --tokenizer x --max-tokens 1000000 --out d"
echo "$ torchrun --nproc-per-node $GPUS train_ref.py --data d --init scratch --n-layer 2 \
    --epochs 3 --batch-size 8 --out o --seq-len 128"
echo "$ python eval_math.py --model o"
"""
    )
    plan.main([str(recipe), "--n-gpus", "2"])
    shown = capsys.readouterr().out
    for part in ("train_ref.py o", "0.003B", "2,930", "eval_math.py (not planned)"):
        assert part in shown


def test_one_command_without_an_out_is_planned(capsys):
    """The second example of the module's docstring."""
    command = (
        f"train_slm.py --init {TINY} --data d --k 0.6 --seq-len 2048 --batch-size 512 "
        f"--micro-batch-size 2 --moments bfloat16"
    )
    plan.main(["--command", command, *"--tokens d=1e9 --gpu 4090 --n-gpus 1".split()])
    shown = capsys.readouterr().out
    assert "optimiser 4.4" in shown
    assert "): fits\n" in shown
    # 954 steps, a state after each 250th and the last one: 8 bytes a parameter, 1 GB/s
    assert "4 states of 8.8 GB, 8.8 a rank; training stands still 0.6 minutes in all" in shown


SOMEBODYS = r"""#!/bin/bash
#SBATCH --gpus 8
# train_slm.py --data of-a-comment: it isn't run
touch {ran}
. lib/common.sh
DATA=data/mine   # its tokens
export COMMON="--seq-len 2048 --batch-size 512 --micro-batch-size 4"
cp train_slm.py old/ && echo "train_slm.py --k 0.6"
for k in 0.6; do
    CUDA_VISIBLE_DEVICES=0 torchrun --nproc-per-node ${{GPUS:-8}} kit/train_slm.py --data $DATA \
        --init {init} ${{COMMON}} --steps ${{STEPS:-${{LONG:-1000}}}} --k $K --out "out/k $K" 2>&1 \
        | tee out/log && python eval_math.py --model out/slm
done
"""


def test_anyones_shell_file_is_read_and_not_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.sh"
    file.write_text(SOMEBODYS.format(ran=tmp_path / "ran", init=TINY))
    monkeypatch.setenv("K", "0.7")
    # What bash makes of the line, but for the launcher, the log and the loop.
    wanted = (
        f"CUDA_VISIBLE_DEVICES=0 torchrun --nproc-per-node 8 kit/train_slm.py --data data/mine "
        f"--init {TINY} --seq-len 2048 --batch-size 512 --micro-batch-size 4 --steps 1000 --k 0.7 "
        f"--out"
    )
    assert commands_of(file, 8) == [[*wanted.split(), "out/k 0.7"]]
    plan.main([str(file), "--gpu", "h100"])
    assert "out/k 0.7" in capsys.readouterr().out
    monkeypatch.delenv("K")
    with pytest.raises(UserError, match=r"mine.sh, line 10: \$K is known only when the file runs"):
        commands_of(file, 8)
    assert not (tmp_path / "ran").exists()


def test_a_file_without_a_stage_is_not_run_either(tmp_path):
    empty = tmp_path / "r.sh"
    empty.write_text(f"touch {tmp_path}/ran\n")
    with pytest.raises(UserError, match="holds no command of prepare.py, train_ref.py"):
        commands_of(empty, 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, shape",
    [
        ("clm", "--seq-len 512 --batch-size 2"),  # full logits
        ("slm_kept", "--seq-len 256 --batch-size 4"),  # logits held, kept rows
        ("clm_chunked", "--seq-len 1024 --batch-size 2 --vocab-size 4000"),  # activations
        ("slm_lean", "--seq-len 256 --batch-size 2"),  # weights and optimiser
        ("slm_pruned", "--seq-len 512 --batch-size 2"),
        ("slm_kept", "--seq-len 512 --batch-size 4 --checkpointing"),
    ],
)
def test_memory_against_measured_peaks(row, shape):
    args = bench.arguments(f"train --preset cpu-30m --device cpu {shape}".split())
    told, measured = bench_memory.compared(row, args, bf16=False)
    error = told / measured - 1
    assert abs(error) < 0.15, f"planned {told:.3g} bytes, measured {measured:.3g}, {error:+.1%}"


def test_a_copy_of_the_states_on_a_part_of_the_gpus():
    """`--shard-size 8` on 32 GPUs: each holds an eighth of the states, not a 32nd."""
    whole, _ = memory(TINYLLAMA, 1, 2048, ranks=8, parallel="fsdp")
    part, _ = memory(TINYLLAMA, 1, 2048, ranks=32, parallel="fsdp", shards=8)
    assert part == whole
    command = TRAIN.format(TINY, 2048, 128, 4, "--parallel fsdp --shard-size {}")
    eighth, all_of_them = (planned(command.format(size))["memory"] for size in (8, 32))
    assert eighth["weights"] == 4 * all_of_them["weights"]
    with pytest.raises(UserError, match="--shard-size: got 5, wanted a divisor of 32 GPUs"):
        planned(command.format(5))
