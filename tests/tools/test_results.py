"""tools.results: the numbers on the pages are those of results/; a page that differs is named."""

import json

import pytest

import train_slm
from common.errors import UserError
from conftest import write_model, write_set
from tools.results import __main__ as results
from tools.results import files, pages, tables
from tools.results.collect import collected

CLM_CURVE = [[100, 0.6], [200, 0.5], [300, 0.4]]
SLM_CURVE = [[100, 0.5], [200, 0.3], [300, 0.2]]  # 0.4 is crossed at 150 tokens


def run(method, seed, variant, match, curve):
    numbers = {"val_loss": curve[-1][1], "exact_match": match, "tokens_seen": 300}
    return files.Run(method, seed, variant, numbers, curve, {}, {}, {})


def experiment(matches=(0.9, 0.8)):
    """Two roundings of one seed."""
    made = files.Experiment("roundings", "bash runs/roundings.sh")
    for variant, match in zip(("1 thread", "2 threads"), matches):
        files.add(made, run("ref", 3, variant, 0.5, [[300, 0.45]]))
        files.add(made, run("clm", 3, variant, 0.25, CLM_CURVE))
        files.add(made, run("slm", 3, variant, match, SLM_CURVE))
    return made


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with one page and one file of results in place of the repository's."""
    for module in (files, pages):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(files, "FOLDER", tmp_path / "results")
    page = "# Title\n<!-- results: roundings by-seed -->\n<!-- end of results -->\nAfter.\n"
    (tmp_path / "README.md").write_text(page)
    files.save(experiment())
    return tmp_path


def test_the_pages_of_this_repository_are_made_from_its_results():
    assert pages.update(check=True) == [], "make them again with python -m tools.results"


def test_a_table_has_the_numbers_of_its_file(repository, stage):
    assert stage(results, "") == (0, "made again: README.md\n", "")
    text = (repository / "README.md").read_text()
    row = [cell.strip() for cell in text.splitlines()[5].strip("|").split("|")]
    assert row == ["3", "2", "0.800 to 0.900", "0.250 to 0.250", "0.500 to 0.500"] + [
        "0.050",
        "2.0 to 2.0",
    ]
    assert text.startswith("# Title\n") and text.endswith("<!-- end of results -->\nAfter.\n")
    assert stage(results, "--check") == (0, "every table is that of results/\n", "")


def test_a_number_that_was_changed_by_hand_is_found(repository, stage):
    stage(results, "")
    page = repository / "README.md"
    page.write_text(page.read_text().replace("0.900", "0.990"))
    code, _, err = stage(results, "--check")
    assert code == 2 and "README.md: the tables are not those of results/" in err
    assert "0.990" in page.read_text(), "--check wrote"


def test_results_that_changed_make_the_page_stale(repository, stage):
    stage(results, "")
    files.save(experiment(matches=(0.9, 0.7)))
    assert stage(results, "--check")[0] == 2


def test_a_note_stands_above_the_table(repository, stage):
    noted = experiment()
    noted.note = "Measured with the setting before today."
    files.save(noted)
    stage(results, "")
    assert (
        "*Measured with the setting before today.*\n\n|" in (repository / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "mark, said",
    [
        ("<!-- results: roundings -->\nno end\n", "has no `<!-- end of results -->`"),
        ("<!-- results: roundings of-all -->\n<!-- end of results -->\n", "no table is called"),
        ("<!-- results: nothing -->\n<!-- end of results -->\n", "nothing.json does not exist"),
    ],
)
def test_a_mark_that_cannot_be_filled_is_named(repository, stage, mark, said):
    (repository / "README.md").write_text(mark)
    code, _, err = stage(results, "")
    assert code == 2 and said in err
    assert (repository / "README.md").read_text() == mark


def test_a_run_is_a_line_and_is_replaced_by_its_repetition(repository):
    path = files.path_of("roundings")
    before = path.read_text().splitlines()
    again = files.load("roundings")
    files.add(again, run("slm", 3, "1 thread", 0.125, SLM_CURVE))
    files.save(again)
    after = path.read_text().splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1 and json.loads(changed[0].rstrip(","))["numbers"] == {
        "val_loss": 0.2,
        "exact_match": 0.125,
        "tokens_seen": 300,
    }


def test_what_was_not_run_is_listed():
    not_run = experiment()
    not_run.not_run["avx512"] = "no such kernels"
    assert tables.render("roundings not-run", not_run) == ["- avx512: no such kernels"]


def test_tokens_to_a_loss_are_interpolated():
    assert tables.reached(SLM_CURVE, 0.4) == 150
    assert tables.reached(CLM_CURVE, 0.1) is None
    assert tables.reached([[100, 0.3], [200, 0.2]], 0.3) == 100


def test_moments_are_compared_seed_by_seed():
    """Three seeds whose losses lie far apart, and their differences near to each other."""
    made = files.Experiment("moments", "bash runs/moments.sh")
    for seed, (loss, off) in enumerate([(0.3, 0.001), (0.4, 0.002), (0.5, 0.003)]):
        files.add(made, run("slm", seed, "float32", None, [[300, loss]]))
        files.add(made, run("slm", seed, "int8", None, [[300, loss + off]]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.moments(made)]
    assert rows[2:] == [
        ["SLM, validation loss", "float32", "8", "3", "0.4000", "–"],
        # Of three differences with sd 0.001: 4.303 x 0.001 / sqrt(3).
        ["SLM, validation loss", "int8", "2", "3", "0.4020", "+0.0020 ± 0.0025"],
    ]


def test_the_interval_of_paired_differences():
    """Of 0, 1, 2, 0, 4: the sd is sqrt(2.8), Student's t of four degrees of freedom 2.776."""
    mean, half = tables.paired([1, 2, 4, 4, 7], [1, 1, 2, 4, 3])
    assert (mean, round(half, 3)) == (1.4, 2.077)
    assert tables.paired([1], [3]) == (-2, None)


def test_a_run_is_added_with_what_made_it(repository, stage, vocabulary):
    write_set(repository / "d", vocabulary, 600)
    write_model(repository / "m", vocabulary)
    flags = "--k 1 --data d --val d --init m --out x --seq-len 16 --batch-size 4 --device cpu"
    assert stage(train_slm, f"{flags} --steps 2 --seed 5 --eval-every 1")[0] == 0
    files.save(files.Experiment("new", "make", not_run={"one": "why", "two": "why"}))
    code, out, err = stage(results, "--add new --variant one --run clm=x")
    assert (code, err) == (0, "") and "1 runs" in out

    assert files.load("new").not_run == {"two": "why"}, "one was run after all"
    (added,) = files.load("new").runs
    summary = json.loads((repository / "x/summary.json").read_text())
    assert (added.method, added.seed, added.variant) == ("clm", 5, "one")
    assert added.numbers["val_loss"] == summary["val_loss"]
    assert added.curve[-1] == [summary["tokens_seen"], round(summary["val_loss"], 5)]
    assert len(added.curve) == 3  # the start, and behind each step
    assert added.arguments["steps"] == 2 and "out" not in added.arguments
    assert set(added.inputs) >= {"data", "init"}
    assert set(added.made) == {
        "commit",
        "date",
        "python",
        "versions",
        "lock",
        "machine",
        "environment",
    }
    assert added.made["versions"]["torch"]


def test_what_cannot_be_added_changes_nothing(repository, stage):
    before = files.path_of("roundings").read_text()
    for flags, said in [
        ("--add new --run clm=x", "--command: got none"),
        ("--add roundings --run clm", "wanted METHOD=FOLDER"),
        ("--add roundings --run clm=x", "is not a run"),
        ("--add roundings --not-run avx", "wanted VARIANT: WHY"),
    ]:
        code, _, err = stage(results, flags)
        assert code == 2 and said in err, err
    assert files.path_of("roundings").read_text() == before
    with pytest.raises(UserError, match="is not a run"):
        collected(repository, "clm")
