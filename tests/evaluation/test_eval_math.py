"""The evaluation stage: whole runs on small models, kills, tools against published generations."""

import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import eval_math as E
from common.files import write_atomic
from conftest import SHARED, finish, launch, write_model
from evaluation import reasoning
from evaluation.generate import Output
from hf import checkpoint
from killed import killed
from model import Config, Transformer
from real_model import real_model

needs_data = pytest.mark.skipif(
    not SHARED.exists(), reason=f"needs the public test sets and outputs in {SHARED}"
)
QUESTIONS = [
    f"Q: Tom has {i % 17} apples and buys {i % 5}.{' How many?' * (i % 3)}\nA:" for i in range(40)
]


def write_problems(folder, answers):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"question": question, "answer": answer})
        for question, answer in zip(QUESTIONS, answers)
    ]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def parrot(folder, vocabulary, text):
    """A run's folder whose model says `text` after every prompt that ends as the questions do.

    It looks the next id up by the last one: its blocks add nothing, and its head is the look-up.
    """
    ids = vocabulary.encode("A:" + text).tolist()
    ids = ids[ids.index(vocabulary.encode("Tom\nA:").tolist()[-1]) :]
    assert len(set(ids)) == len(ids), "the look-up needs different ids"
    model = Transformer(
        Config(
            vocab_size=vocabulary.n_vocab,
            hidden_size=512,
            intermediate_size=16,
            head_dim=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    vectors = torch.nn.functional.normalize(
        torch.randn(vocabulary.n_vocab, 512, generator=torch.manual_seed(0))
    )
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            p.data.zero_()
    model.model.embed_tokens.weight.data.copy_(vectors)
    for i, following in zip(ids, ids[1:]):
        model.lm_head.weight.data[following] += vectors[i]
    checkpoint.save(model, folder)
    vocabulary.save(folder)
    write_atomic(folder / "summary.json", '{"val_loss": 1.5, "exact_match": null}')
    write_atomic(folder / "args.json", '{"data": "data/demo/corpus"}')
    return folder


def test_exact_match_is_counted_and_noted(stage, vocabulary, tmp_path):
    """A model that always says 7: the share of sevens, in results.json and the run's summary."""
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7", "8", "7", "77", "-7", "7"])
    code, out, err = stage(E, "--model run --tasks data/demo/test.jsonl --device cpu")
    assert code == 0, err
    done = rows(tmp_path / "run/eval/test.jsonl")
    assert [row["idx"] for row in done] == list(range(6))
    assert {row["text"] for row in done} == {"#### 7"} and {row["pred"] for row in done} == {"7"}
    assert [row["strict"] for row in done] == [True, False, True, False, False, True]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {
        "val_loss": 1.5,
        "exact_match": 0.5,
    }
    entry = json.loads((tmp_path / "run/eval/results.json").read_text())["test"]
    assert entry["strict"] == 50.0 and entry["n"] == 6 and "50.0" in out
    assert entry["settings"]["model_hash"] == checkpoint.model_hash(tmp_path / "run")[:16]
    assert not list((tmp_path / "run/eval").glob("*partial*"))


def test_other_problems_leave_the_run_s_exact_match_alone(stage, vocabulary, tmp_path):
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "elsewhere", ["7", "7"])
    assert stage(E, "--model run --tasks elsewhere/test.jsonl --device cpu")[0] == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["exact_match"] is None


def test_a_finished_task_needs_no_model(stage, vocabulary, tmp_path, monkeypatch):
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7", "8", "7"])
    assert stage(E, "--model run --limit 2")[0] == 0
    assert (
        json.loads((tmp_path / "run/summary.json").read_text())["exact_match"] is None
    )  # of a part: not noted
    assert stage(E, "--model run")[0] == 0  # the third is answered, the first two are kept
    code, _, err = stage(E, "--model run --limit 2")
    assert code == 2 and "--limit: got 2, run/eval has answers to test up to problem 3" in err
    monkeypatch.setattr(checkpoint, "load", None)
    code, out, _ = stage(E, "--model run")
    assert code == 0 and "66.7" in out
    code, again, _ = stage(E, "--model run --out run/eval")
    assert code == 0 and again == out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--model run --max-new-tokens 5", "max_new_tokens 48 -> 5"),
        ("--model run --tasks gms8k", "gms8k"),
        ("--model run --limit 0", "--limit"),
        ("--model nowhere", "nowhere"),
        ("", "--model"),
        ("--model run --mode tool", "data/demo/test.jsonl"),
        ("--model run --tasks nothing.jsonl", "nothing.jsonl"),
        ("--model run --tasks data/demo/test.jsonl,other/test.jsonl", "wanted names that differ"),
        ("--model run --out data/demo", "overlaps with --tasks data/demo/test.jsonl"),
        ("--model run --out data/demo --overwrite", "overlaps with --tasks data/demo/test.jsonl"),
        ("--model run --tasks svamp --data-dir empty", "eval/svamp.jsonl"),
        ("--regrade test.jsonl --tasks svamp asdiv", "--regrade"),
        ("--regrade nothing.jsonl --tasks gsm8k", "nothing.jsonl"),
        ("--model run --tasks gsm8k --data-dir nothing", "nothing"),
        ("--model run --batch-tokens -1", "--batch-tokens"),
        ("--model run --tasks ,", "--tasks: got none"),
        ("--model run --strict-sandbox", "--strict-sandbox: does nothing without --mode tool"),
        ("--model run --data-dir empty", "--data-dir: does nothing with"),
        ("--model run --tasks none.jsonl", "none.jsonl has no problem"),
        (
            "--model run --tasks text.jsonl",
            "problem 1: got no usable answer ('seven' is no single number",
        ),
        ("--model run --tasks half.jsonl", "problem 1: got no usable 'utf-8' codec"),
        ("--regrade none.jsonl --tasks gsm8k", "--regrade: none.jsonl has no line"),
        (
            "--regrade x.jsonl --tasks gsm8k --max-new-tokens 5",
            "--max-new-tokens: does nothing with --regrade",
        ),
        (
            "--regrade x.jsonl --tasks gsm8k --revision main",
            "--revision: does nothing with --regrade",
        ),
        ("--regrade x.jsonl --tasks gsm8k --temperature 5000", "--temperature: got 5000"),
        ("--regrade x.jsonl", "--tasks: got none, wanted the one that x.jsonl answers"),
        ("--regrade x.jsonl --tasks gsm8k --seed 0", "--seed: does nothing with --regrade"),
        ("--model run --seed 3", "--seed: got 3 without --temperature"),
    ],
)
def test_users_errors_are_one_line(stage, vocabulary, tmp_path, arguments, words):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "text.jsonl").write_text('{"question": "q", "answer": "seven"}')
    (tmp_path / "half.jsonl").write_text(r'{"question": "\ud800", "answer": "7"}')
    if "new-tokens" in arguments:
        assert stage(E, "--model run")[0] == 0
    code, _, err = stage(E, arguments)
    last = err.strip().split("\n")[-1]
    assert code == 2 and last.startswith("error: ") and words in last and "Traceback" not in err


def test_a_file_whose_name_has_a_comma_is_one_task(stage, vocabulary, tmp_path):
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7"])
    (tmp_path / "data/demo/test.jsonl").rename(tmp_path / "a,b.jsonl")
    code, _, err = stage(E, "--model run --tasks a,b.jsonl")
    assert code == 0 and rows(tmp_path / "run/eval/a,b.jsonl")[0]["strict"], err


def test_answers_are_kept_where_results_json_is_gone(stage, vocabulary, tmp_path):
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7", "8"])
    assert stage(E, "--model run")[0] == 0
    (tmp_path / "run/eval/results.json").unlink()
    done = (tmp_path / "run/eval/test.jsonl").read_bytes()
    code, _, err = stage(E, "--model run --limit 1")
    assert code == 2 and "run/eval/test.jsonl has answers, and results.json beside it" in err
    assert (tmp_path / "run/eval/test.jsonl").read_bytes() == done
    assert stage(E, "--model run --overwrite")[0] == 0


@pytest.mark.slow
def test_graded_again_is_not_put_beside_unfinished_answers(stage, vocabulary, tmp_path):
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7", "8"] * 5)
    killed("call:evaluation.grading:Grader.add:5", "eval_math.py --model run --out cut", tmp_path)
    (tmp_path / "in.jsonl").write_text('{"gt": "1", "text": "#### 1"}\n')
    again = "--regrade in.jsonl --tasks data/demo/test.jsonl --out cut"
    code, _, err = stage(E, again)
    assert code == 2 and "--out cut: holds a model's unfinished answers to test" in err
    assert stage(E, "--model run --out cut")[0] == 0


@pytest.mark.parametrize("flags", ["", "--temperature 1"])
def test_a_model_whose_logits_are_not_finite_is_refused(stage, vocabulary, tmp_path, flags):
    write_model(tmp_path / "run", vocabulary)
    model = checkpoint.load(tmp_path / "run")
    model.model.norm.weight.data[0] = torch.nan
    checkpoint.save(model, tmp_path / "run")
    write_problems(tmp_path / "data/demo", ["7"])
    code, _, err = stage(E, f"--model run {flags}")
    assert code == 2 and "error: model: its logits are not finite" in err and "Trace" not in err


def test_another_model_of_one_name_is_refused_in_one_folder(stage, vocabulary, tmp_path):
    """Trained again and evaluated on another task: no row of the table is of two models."""
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"])
    write_problems(tmp_path / "more", ["7"])
    (tmp_path / "more/test.jsonl").rename(tmp_path / "more/other.jsonl")
    both = "--tasks data/demo/test.jsonl more/other.jsonl"
    assert stage(E, "--model run --out o")[0] == 0
    write_model(tmp_path / "run", vocabulary, seed=7)
    code, _, err = stage(E, "--model run --out o --tasks more/other.jsonl")
    assert code == 2 and "--out o: test was answered by another run (its weights were" in err
    done = (tmp_path / "o/test.jsonl").read_bytes()
    again = "--model run --out o --tasks more/other.jsonl --overwrite"
    assert stage(E, again)[0] == 2 and (tmp_path / "o/test.jsonl").read_bytes() == done
    assert stage(E, f"--model run --out o {both} --overwrite")[0] == 0
    hashes = {
        entry["settings"]["model_hash"]
        for entry in json.loads((tmp_path / "o/results.json").read_text()).values()
    }
    assert hashes == {checkpoint.model_hash(tmp_path / "run")[:16]}


def test_a_changed_config_or_tokenizer_makes_other_answers(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"])
    assert stage(E, "--model run --out o")[0] == 0
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 50000.0}))
    code, _, err = stage(E, "--model run --out o")
    assert code == 2 and "o/test.jsonl holds other answers (config_hash" in err
    results = json.loads((tmp_path / "o/results.json").read_text())
    del results["test"]["settings"]["config_hash"]  # as an older kit wrote it
    (tmp_path / "o/results.json").write_text(json.dumps(results))
    assert stage(E, "--model run --out o")[0] == 0


@needs_data
def test_with_tools_no_few_shot_prompts_are_needed(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    (tmp_path / "own/eval").mkdir(parents=True)
    (tmp_path / "own/eval/svamp.jsonl").symlink_to(SHARED / "eval/svamp.jsonl")
    flags = "--tasks svamp --data-dir own --limit 1 --max-new-tokens 4 --out o"
    code, _, err = stage(E, f"--model run --mode tool {flags}")
    assert code == 0, err
    code, _, err = stage(E, f"--model run {flags}")
    assert code == 2 and "prompts/gsm8k.md" in err


def test_overwrite_starts_over(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7", "7"])
    for flags in ("", "--max-new-tokens 5 --overwrite"):
        assert stage(E, f"--model run {flags}")[0] == 0
    entry = json.loads((tmp_path / "run/eval/results.json").read_text())["test"]
    assert entry["settings"]["max_new_tokens"] == 5


def test_the_demo_s_problems_are_named_where_they_are_missing(stage, vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    code, _, err = stage(E, "--model run")
    assert code == 2 and "python prepare.py" in err and err.count("\n") == 1


@pytest.mark.slow  # a sample of every moment is in tests/reliability
def test_killed_and_called_again_ends_identical(stage, vocabulary, tmp_path):
    """kill -9 after eight answers, a line cut short: the files are an uninterrupted run's."""
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"] * 40)
    arguments = "--model run --batch-tokens 600 --device cpu --out "
    killed("call:evaluation.grading:Grader.add:8", f"eval_math.py {arguments}killed", tmp_path)
    part = tmp_path / "killed/test.partial-0.jsonl"
    assert part.read_bytes().count(b"\n") == 1 + 8
    assert not (tmp_path / "killed/test.jsonl").exists()
    with open(part, "a") as file:
        file.write('{"idx": 39, "te')
    assert stage(E, arguments + "killed")[0] == 0
    assert stage(E, arguments + "whole")[0] == 0
    for name in ("test.jsonl", "results.json", "results.md"):
        ends = [(tmp_path / out / name).read_bytes() for out in ("killed", "whole")]
        assert ends[0] == ends[1], name
    assert len(rows(tmp_path / "whole/test.jsonl")) == 40


@pytest.mark.slow  # a sample of every moment is in tests/reliability
@pytest.mark.parametrize(
    "point", ["before:results.json:1", "after:results.json:1", "after:test.jsonl:1"]
)
def test_killed_while_it_writes_results(stage, vocabulary, tmp_path, point):
    """Between any two files: the same command ends what was begun."""
    parrot(tmp_path / "run", vocabulary, " #### 7\n")
    write_problems(tmp_path / "data/demo", ["7", "8"])
    killed(point, "eval_math.py --model run --device cpu", tmp_path)
    code, out, err = stage(E, "--model run --device cpu")
    assert code == 0 and "50.0" in out, err
    assert [row["strict"] for row in rows(tmp_path / "run/eval/test.jsonl")] == [True, False]
    assert json.loads((tmp_path / "run/summary.json").read_text())["exact_match"] == 0.5
    assert not list((tmp_path / "run/eval").glob("*partial*"))


@needs_data
def test_gsm8k_from_end_to_end(stage, vocabulary, tmp_path):
    """A random model on real problems: the prompts are the harness's (their hash), nonsense scores
    0, and grading the written file again gives the same verdicts."""
    write_model(tmp_path / "run", vocabulary, max_position_embeddings=8192)
    (tmp_path / "data").symlink_to(SHARED)
    code, out, err = stage(
        E, "--model run --tasks gsm8k --data-dir data --limit 3 --max-new-tokens 8 --out out"
    )
    assert code == 0, err
    entry = json.loads((tmp_path / "out/results.json").read_text())["gsm8k"]
    truth = json.loads((SHARED / "truth/summary.json").read_text())["gsm8k"]
    assert entry["settings"]["prompt_hash"] == truth["prompts_sha256"][:16] and entry["n"] == 3
    assert entry["settings"]["max_new_tokens"] == 8
    done = rows(tmp_path / "out/gsm8k.jsonl")
    assert [row["gt"] for row in done] == ["18", "3", "70000"] and entry["published"] == 0
    assert stage(E, "--regrade out/gsm8k.jsonl --tasks gsm8k --out again")[0] == 0
    assert rows(tmp_path / "again/gsm8k.jsonl") == done
    assert "Rho-1-Math-1B" in (tmp_path / "out/results.md").read_text()


# --------------------------------------------------------------------------------------------------
# tools


class Replay:
    """In a decoder's place: continues each prompt as in a published text, up to the next stop."""

    def __init__(self, published):
        self.published, self.waiting, self.n_calls = published, [], 0

    def add(self, i, prompt):
        self.waiting.append((i, prompt))

    @property
    def busy(self):
        return bool(self.waiting)

    def step(self):
        i, prompt = self.waiting.pop()
        assert prompt.startswith("<|user|>\n"), prompt
        so_far = prompt.split("<|assistant|>\n", 1)[1]
        self.n_calls += 1
        # Our programs' outputs are theirs.
        assert self.published[i].startswith(so_far), (so_far, self.published[i])
        text = self.published[i][len(so_far) :].split("```output")[0]
        return [(i, Output(text, [0] * len(text), "stop"))]


def ask(question):
    return f"<|user|>\n{question}\n<|assistant|>\n"


@needs_data
@pytest.mark.parametrize("folder, n", [("gsm8k", 30), ("minerva_math", 30)])
def test_tool_loop_rebuilds_published_texts(folder, n, monkeypatch):
    """A replay of the authors' texts in their model's place gives the published text again.

    So every output of ours must be what their model was shown. Programs get more time, and texts
    with a time-out are left out: a slow machine must not make a time-out of what was none. Texts
    that import scipy need it.
    """
    monkeypatch.setattr(reasoning, "Sandbox", partial(reasoning.Sandbox, timeout=600))
    path = next((SHARED / "published/rho-math-1b-interpreter-v0.1" / folder).glob("*e-1.jsonl"))
    published = rows(path)
    many = sorted(range(len(published)), key=lambda i: -published[i]["code"][0].count("```output"))
    texts = {i: published[i]["code"][0] for i in [*many[: n // 3], *range(n)]}
    texts = {
        i: text
        for i, text in texts.items()
        if "Time" not in text.split("```output", 1)[-1]
        and ("scipy" not in text or find_spec("scipy"))
    }
    prompts, decoder = {i: ask(published[i]["question"]) for i in texts}, Replay(texts)
    got = {i: reply.text for i, reply in reasoning.with_tools(decoder, prompts, encode=str)}
    assert {i: text.strip() for i, text in got.items()} == {
        i: text.strip() for i, text in texts.items()
    }
    assert decoder.n_calls > len(texts)


def test_tool_loop_ends_after_four_calls(monkeypatch):
    monkeypatch.setattr(reasoning, "Sandbox", partial(reasoning.Sandbox, timeout=600))

    class Coder(Replay):
        def step(self):
            i, prompt = self.waiting.pop()
            return [(i, Output("```python\nprint(6 * 7)\n```\n", [1, 2], "stop"))]

    ((_, reply),) = reasoning.with_tools(Coder({}), {0: ask("What?")}, encode=str)
    block = "```python\nprint(6 * 7)\n```\n```output\n42\n```\n"
    assert reply.text == block * 4 + "\nReach max function call limit."
    assert reply.tokens == 8 and reply.finish_reason == "calls"


# --------------------------------------------------------------------------------------------------
# long runs


@pytest.mark.slow
def test_two_ranks_give_the_file_of_one(vocabulary, tmp_path):
    write_model(tmp_path / "run", vocabulary)
    write_problems(tmp_path / "data/demo", ["7"] * 40)
    command = "eval_math.py --model run --device cpu --out "
    finish(launch(command + "one", tmp_path))
    finish(launch(command + "two", tmp_path, ranks=2))
    for name in ("test.jsonl", "results.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
@needs_data
def test_real_model_answers_real_problems(stage, tmp_path):
    """SmolLM2-135M on problems of SVAMP: it answers in the form of the few shots, and stops."""
    folder = real_model()
    code, _, err = stage(
        E,
        f"--model {folder} --tasks svamp --data-dir {SHARED} --limit 8 --max-new-tokens 160 "
        f"--out out",
    )
    assert code == 0, err
    done = rows(tmp_path / "out/svamp.jsonl")
    assert sum("answer is" in row["text"] for row in done) >= 4
    assert not any("\n\nQuestion:" in row["text"] for row in done)
