"""Prompts, questions and true answers against hashes made by the paper's harness; downloads."""

import hashlib
import http.client
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from common.errors import UserError  # noqa: E402
from common.owned import LIST  # noqa: E402
from evaluation import pinned, tasks  # noqa: E402
from evaluation.answers import number_of  # noqa: E402
from evaluation.grading import own_verdict  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason=f"needs the public test sets and their hashes in {DATA}"
)


def truth_of(task):
    return [
        json.loads(line)
        for line in (DATA / "truth" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@needs_data
@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompts_and_truths_are_the_harness_s(task):
    summary, truth = json.loads((DATA / "truth" / "summary.json").read_text())[task], truth_of(task)
    examples = tasks.load(task, DATA)
    assert [example.idx for example in examples] == list(range(summary["n"]))
    hashes = [hashlib.sha256(example.prompt.encode()).hexdigest()[:16] for example in examples]
    assert hashes == [row["prompt_sha256_16"] for row in truth]
    together = hashlib.sha256(
        "\0".join(tasks.prompt(example, "cot") for example in examples).encode()
    ).hexdigest()
    assert together == summary["prompts_sha256"]
    assert [example.gt for example in examples] == [
        row["truth"] for row in truth
    ]  # equal strings, so equal answers


@needs_data
def test_prefix_is_shared_and_tool_prompt_has_no_shots():
    for task in tasks.TASKS:
        prefix, examples = tasks.prefix(task, DATA), tasks.load(task, DATA, limit=3)
        assert len(examples) == 3
        assert all(example.prompt.startswith(prefix) for example in examples)
        assert (
            prefix + "Question: " + examples[0].question + "\nAnswer:" == examples[0].prompt
            or prefix + "Problem:\n" + examples[0].question + "\nSolution:" == examples[0].prompt
        )
    tool = tasks.prompt(tasks.load("svamp", DATA, limit=1)[0], "tool")
    assert tool.startswith("<|user|>\nThere are 87 oranges and 290 bananas in Philip's collection.")
    assert tool.endswith("How big is each group of bananas?\n<|assistant|>\n")


@needs_data
def test_every_file_has_the_pinned_checksum_and_address():
    sources = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    for name, sha256 in pinned.SHA256.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == sha256
        owner, repository, commit = pinned.address(name).split("/")[:3]
        assert f"{owner}/{repository}, commit {commit}" in sources
    files = {task.file for task in tasks.TASKS.values()}
    shots = {task.shots for task in tasks.TASKS.values()}
    assert files | shots == set(pinned.SHA256)


def test_addresses_at_the_sources():
    harness = "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
    promptpg = "lupantech/PromptPG/7cf61b1bec07222fc24b4f5a1410911f77c2d2c9"
    for name, address in {
        "eval/gsm8k.jsonl": f"{harness}/data/gsm8k/test.jsonl",
        "eval/math_oai.jsonl": f"{harness}/data/math_oai/test.jsonl",
        "eval/tabmwp_test1k.json": f"{promptpg}/data/tabmwp/problems_test1k.json",
        "prompts/minerva_math.md": f"{harness}/prompts/cot/minerva_math.md",
    }.items():
        assert pinned.address(name) == address


def test_a_file_of_ones_own_is_asked_as_it_stands(tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [
        {"question": "Problem: 3 + 4 = ? \n", "answer": "7.0"},
        {"question": "x", "answer": 12},
        {"question": " y", "answer": "5 + 2 = 7\n#### 7"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    examples = tasks.load(str(file))
    assert [(example.prompt, example.gt) for example in examples] == [
        ("Problem: 3 + 4 = ? \n", "7.0"),
        ("x", "12"),
        (" y", "7"),
    ]
    assert tasks.prefix(str(file)) == ""
    assert tasks.label(str(file)) == "test" and tasks.label("gsm8k") == "gsm8k"
    with pytest.raises(UserError, match="nowhere.jsonl, which is not there"):
        tasks.load("nowhere.jsonl")
    file.write_text('{"question": 3, "answer": 3}')
    with pytest.raises(UserError, match="problem 1: got no usable question, wanted the fields of"):
        tasks.load(str(file))


@pytest.mark.parametrize(
    "answer, truth",
    [
        ("#### 7.0", "7.0"),
        (7.5, "7.5"),
        ("#### .5", ".5"),
        ("#### 7\nDone", "7"),
        ("+5", "5"),
        ("1,250 km", "1250"),
        ("#### - 5", "-5"),
        *((answer, None) for answer in ("1/2", "1e5", "100 000", "seven", "", {"a": 1}, None)),
    ],
)
def test_a_true_answer_of_ones_own_is_read_as_a_models_is(tmp_path, answer, truth):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": answer}))
    if truth is None:
        with pytest.raises(UserError, match="problem 1: got no usable answer"):
            tasks.load(str(file))
        return
    [example] = tasks.load(str(file))
    assert example.gt == truth
    said = answer if "####" in str(answer) else f"#### {answer}"
    assert own_verdict(said, example.gt) == {
        "pred": truth,
        "gt": truth,
        "published": True,
        "strict": True,
        "reason": "",
    }


def test_odd_rows_become_the_texts_of_the_protocol():
    """Forms that the pinned files may or may not hold, written out by hand from the protocol."""
    options = "['a ) a ) 4 cm ²', 'b ) b ) none']"
    text = tasks.mathqa_question({"problem": "how many ?", "options": options})
    assert text == (
        "How many ?\nWhat of the following is the right choice? Explain your answer.\n"
        "(A) 4 cm ², (B) none"
    )
    row = {
        "table_title": None,
        "table": "a | b\n1 | 2",
        "question": "More?",
        "choices": ["yes", "it's"],
    }
    assert tasks.tabmwp_question(row) == (
        "Read the following table and answer a question:\na | b\n1 | 2\nMore? "
        "Please select from the following options: ['yes', \"it's\"]"
    )
    for answer, truth in (("3/10", 0.3), ("1,522.81", 1522.81), ("5%", 0.05)):
        assert float(
            tasks.tabmwp_truth({"answer": answer, "ans_type": "decimal_number"})
        ) == pytest.approx(truth)
    assert tasks.tabmwp_truth({"answer": "1/2 cup", "ans_type": "extractive_text"}) == "1/2 cup"
    assert (
        tasks.svamp_question({"Body": " A has 3 ", "Question": "How many?"}) == "A has 3. How many?"
    )
    assert tasks.sat_question({"question": "q", "options": "A) 1 B) 2 C) 3"}).endswith(
        "\n(A) 1 (B) 2 (C) 3"
    )


def test_true_or_false_is_asked_for(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/gsm8k.md").write_text("\nSHOTS\n\n")
    rows = [
        {"question": " Is 2 even? ", "answer": f"...\n#### {answer}"}
        for answer in ("True", "no", "3")
    ]
    (tmp_path / "eval/gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [example.prompt for example in tasks.load("gsm8k", tmp_path)] == [
        f"SHOTS\n\n\nQuestion: Is 2 even?{added}\nAnswer:"
        for added in (" (True or False)", " (Yes or No)", "")
    ]


# --------------------------------------------------------------------------------------------------
# files and downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(base address, {path: body} served there, paths asked for); the cache is an empty folder."""
    bodies, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = bodies.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("RHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pinned, "GITHUB", f"http://127.0.0.1:{running.server_port}")
    yield bodies, asked
    running.shutdown()
    running.server_close()


@pytest.fixture
def small(monkeypatch):
    """GSM8K replaced by one problem and short shots: {path at the source: body}."""
    bodies = {
        "eval/gsm8k.jsonl": b'{"question": "1 + 1?", "answer": "#### 2"}\n',
        "prompts/gsm8k.md": b"SHOTS",
    }
    sums = {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    monkeypatch.setattr(pinned, "SHA256", sums)
    return {"/" + pinned.address(name): body for name, body in bodies.items()}


def test_an_answer_that_breaks_off_and_shots_that_are_no_text_are_no_traceback(
    server, small, tmp_path, monkeypatch
):
    def broken(part):
        raise http.client.IncompleteRead(b"")

    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPResponse, "read", lambda self, n: broken(n))
        with pytest.raises(UserError, match="gsm8k.*: got no file from"):
            tasks.load("gsm8k")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/gsm8k.md").write_bytes(b"SHOTS \xff")
    assert tasks.prefix("gsm8k", tmp_path) == "SHOTS \ufffd\n\n\n"


def test_download_once_then_cache(server, small, tmp_path):
    bodies, asked = server
    bodies.update(small)
    first = tasks.load("gsm8k")
    assert first[0].prompt == "SHOTS\n\n\nQuestion: 1 + 1?\nAnswer:" and first[0].gt == "2"
    assert sorted(asked) == sorted(small)
    bodies.clear()
    assert tasks.load("gsm8k") == first and len(asked) == 2
    (tmp_path / "cache/eval/gsm8k.jsonl").write_bytes(b"damaged")  # is noticed, and fetched again
    bodies.update(small)
    assert tasks.load("gsm8k") == first and len(asked) == 3
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(kept) == [LIST, LIST, "gsm8k.jsonl", "gsm8k.md"]


def test_wrong_checksum_is_refused_and_not_kept(server, small, tmp_path):
    bodies, _ = server
    bodies.update({path: body + b" " for path, body in small.items()})
    with pytest.raises(UserError, match="sha256 .* wanted .*--data-dir"):
        tasks.load("gsm8k")
    assert not list((tmp_path / "cache").rglob("*.*l"))


def test_offline_says_how_to_mend_it(server, small, monkeypatch):
    with pytest.raises(UserError, match="--data-dir") as missing:  # the server answers 404
        tasks.load("gsm8k")
    monkeypatch.setattr(pinned, "GITHUB", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="--data-dir") as refused:  # nobody listens
        tasks.load("gsm8k")
    assert "\n" not in str(missing.value) + str(refused.value)


def test_user_errors_name_file_and_line(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "x", "answer": "1"}\n\n{"question": "x", "ans\n')
    with pytest.raises(UserError, match=r"test\.jsonl, line 3: got broken JSON"):
        tasks.load(str(file))
    file.write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match=r"problem 1: got no usable 'answer'"):
        tasks.load(str(file))
    with pytest.raises(UserError, match="got nonesuch, wanted some of gsm8k math"):
        tasks.load("nonesuch")
    with pytest.raises(UserError, match="wanted a folder that holds eval/math_oai.jsonl"):
        tasks.load("math", tmp_path)
    with pytest.raises(UserError, match="wanted cot or tool"):
        tasks.prompt(tasks.Example(0, "", "", "", "", {}), "pot")


def test_own_copy_that_differs_is_used_with_a_warning(tmp_path, capsys):
    for name, text in (
        ("eval/gsm8k.jsonl", '{"question": "q", "answer": "#### 5"}'),
        ("prompts/gsm8k.md", "P"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert tasks.load("gsm8k", tmp_path)[0].gt == "5"
    assert capsys.readouterr().err.count("is not the published file") == 2


def test_neither_file_imports_torch():
    code = "import sys; from evaluation import tasks, grading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "answer, number",
    [
        (7, "7"),
        (7.5, "7.5"),
        ("1,250", "1250"),
        ("so it is\n#### 6 quarters", "6"),
        ("#### 3 m^2", "3"),
        ("#### 42 = total", "42"),
        ("#### half the class is 12", "12"),
        (r"#### \boxed{5}", "5"),
        *((wrong, None) for wrong in ("1/2", "3x+1", "sqrt(2)", "2**10", "x=3 and y=4", "1e+20")),
        *((wrong, None) for wrong in (1e-5, r"\frac{1}{2}", "7k", "7 million", "minus 7", "none")),
    ],
)
def test_the_truth_of_a_problem_of_ones_own_is_a_single_number(answer, number):
    if number is None:
        with pytest.raises(ValueError, match="no single number in digits"):
            number_of(answer)
    else:
        assert number_of(answer) == number
