"""tools.results: the numbers on the pages are those of results/; a page that differs is named."""

import json
from dataclasses import replace

import pytest

import train_slm
from common.errors import UserError
from conftest import write_model, write_set
from runs.methods import told_apart
from tools.results import __main__ as results
from tools.results import ablations, demo, figures, files, methods, pages, pays, seeds, tables
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
    for module in (files, pages, figures):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(files, "FOLDER", tmp_path / "results")
    page = "# Title\n<!-- results: roundings by-seed -->\n<!-- end of results -->\nAfter.\n"
    (tmp_path / "README.md").write_text(page)
    files.save(experiment())
    return tmp_path


def test_pages_and_figures_of_this_repository_are_made_from_its_results():
    differ = pages.update(check=True) + figures.update(check=True)
    assert differ == [], "make them again with python -m tools.results"


def test_a_table_has_the_numbers_of_its_file(repository, stage):
    assert stage(results, "") == (0, "made again: README.md\n", "")
    text = (repository / "README.md").read_text()
    row = [cell.strip() for cell in text.splitlines()[5].strip("|").split("|")]
    assert row == ["3", "2", "0.800 to 0.900", "0.250 to 0.250", "0.500 to 0.500"] + [
        "0.050",
        "2.0 to 2.0",
    ]
    assert text.startswith("# Title\n") and text.endswith("<!-- end of results -->\nAfter.\n")
    assert stage(results, "--check") == (0, "every table and figure is that of results/\n", "")


def test_a_number_that_was_changed_by_hand_is_found(repository, stage):
    stage(results, "")
    page = repository / "README.md"
    page.write_text(page.read_text().replace("0.900", "0.990"))
    code, _, err = stage(results, "--check")
    assert code == 2 and "README.md: tables or figures are not those of results/" in err
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


def test_a_trial_with_other_steps_does_not_replace_what_is_published(repository):
    again = files.load("roundings")
    short = run("slm", 3, "1 thread", 0.5, SLM_CURVE)
    with pytest.raises(UserError, match="slm of seed 3 with None steps, this one has 20; set KIT"):
        files.add(again, replace(short, arguments={"steps": 20}))


def test_runs_on_other_data_do_not_come_into_one_table(repository):
    """Neither in place of one that is there, nor beside it."""
    made = files.load("roundings")
    for variant in ("1 thread", "another"):
        other = replace(run("slm", 3, variant, 0.5, SLM_CURVE), inputs={"data": "of another text"})
        with pytest.raises(UserError, match="slm of seed 3, trained on other data than this one; "):
            files.add(made, other)


def test_students_of_two_bases_are_two_rows():
    """Another machine's base is another one: its seeds are no more of the same."""
    slm = [run("slm", seed, "clm 0.6", None, SLM_CURVE) for seed in range(4)]
    slm = [replace(r, inputs={"init": "ab"[r.seed // 2]}) for r in slm]
    assert [[r.seed for r in own] for own in pays.by_base(slm)] == [[0, 1], [2, 3]]
    on = [replace(r, variant="clm, then again 0.6", inputs={"init": str(r.seed)}) for r in slm]
    assert pays.by_base(on) == [on]


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


@pytest.mark.parametrize("freedom, wanted", [(15, 2.131), (20, 2.086), (30, 2.042), (120, 1.980)])
def test_intervals_of_many_seeds_are_students_too(freedom, wanted):
    """Tabulated two-sided 95 % quantiles."""
    assert round(seeds.t95(freedom), 3) == wanted


def demo_runs(clm_curves, slm_curves):
    """The main comparison over as many seeds as there are curves; a reference costs 50 tokens."""
    made = files.Experiment("demo", "bash runs/demo.sh")
    for seed, (clm, slm) in enumerate(zip(clm_curves, slm_curves, strict=True)):
        files.add(made, run("base", seed, "", 0.1, CLM_CURVE))
        files.add(made, run("ref", seed, "", 0.5 + seed / 10, [[50, 0.3]]))
        made.runs[-1].numbers["tokens_seen"] = 50
        files.add(made, run("clm", seed, "", 0.2, clm))
        files.add(made, run("random", seed, "", 0.1, clm))
        files.add(made, run("slm", seed, "", 0.7 + seed / 5, slm))
    return made


def cells_of(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_demo_s_rows_and_differences_have_intervals():
    """Two seeds: the half of an interval is 12.71 times half of their distance."""
    made = demo_runs([CLM_CURVE] * 2, [SLM_CURVE] * 2)
    rows = cells_of(demo.by_seed(made))
    assert rows[0] == ["", "seed 0", "seed 1", "mean, 95 % interval"]
    assert ["SLM k 0.6, exact match", "0.700", "0.900", "0.800 ± 1.271"] in rows
    assert ["CLM, validation loss", "0.4000", "0.4000", "0.4000 ± 0.0000"] in rows
    assert cells_of(demo.differences(made))[2:] == [
        ["CLM, validation loss", "-0.2000", "-0.2000", "-0.2000 ± 0.0000"],
        ["the reference itself, validation loss", "-0.1000", "-0.1000", "-0.1000 ± 0.0000"],
        ["CLM, exact match", "+0.500", "+0.700", "+0.600 ± 1.271"],
        ["the reference itself, exact match", "+0.200", "+0.300", "+0.250 ± 0.635"],
    ]


def test_a_seed_without_all_its_runs_is_left_out():
    made = demo_runs([CLM_CURVE] * 2, [SLM_CURVE] * 2)
    made.runs = [run for run in made.runs if (run.method, run.seed) != ("ref", 0)]
    assert cells_of(demo.by_seed(made))[0] == ["", "seed 1", "mean, 95 % interval"]


def test_tokens_to_clm_s_loss_without_and_with_the_reference():
    """CLM reads 300 tokens, SLM 150 until there, or 60; a reference costs 50 and 100 of scoring."""
    fast = [[60, 0.4], [300, 0.2]]
    rows = cells_of(demo.tokens(demo_runs([CLM_CURVE] * 2, [SLM_CURVE, fast])))
    # Logarithms of 2 and 5: their mean is that of 10, halved; the half is 12.71 times ln(2.5) / 2.
    spread = 2.5 ** (12.71 / 2)
    within = f"3.2, {10**0.5 / spread:.1f} to {10**0.5 * spread:.1f}"
    assert rows[2] == ["SLM k 0.6", "2.0", "5.0", "3.5", within]
    assert rows[3][:4] == ["its reference and scoring counted", "1.0", "1.4", "1.2"]

    slow = [[300, 0.5]]
    rows = cells_of(demo.tokens(demo_runs([CLM_CURVE] * 2, [SLM_CURVE, slow])))
    assert rows[2] == ["SLM k 0.6", "2.0", "never", "1.0", "–"]


def test_methods_of_a_rate_are_beside_clm_of_that_rate(repository):
    def add(made, method, lr, base, match, loss):
        one = run(method, 1, "" if base == "a" else base, match, [[100, loss]])
        one.inputs["init"] = base
        one.arguments.update(lr=lr, k=1.0)
        files.add(made, one)

    at_rate = files.Experiment("methods-2e-3", "bash runs/methods.sh")
    add(at_rate, "clm", 2e-3, "a", 0.5, 0.40)
    tuned = files.Experiment("methods-tuned", "bash runs/methods.sh")
    add(tuned, "clm", 1e-3, "a", 0.4, 0.43)
    add(tuned, "mile", 2e-3, "a", 0.6, 0.39)
    add(tuned, "dft", 1e-3, "a", 0.6, 0.30)
    add(tuned, "loss", 2e-3, "b", 0.6, 0.20)
    files.save(tuned)
    head, _, *rows = cells_of(methods.beside_clm_at_its_rate(at_rate))
    assert [row[:2] for row in rows] == [
        ["`mile`", "lr 0.002"],
        ["CLM", "lr 0.002"],
        ["CLM", "lr 0.001"],
    ]
    assert [row[4:] for row in rows] == [
        ["-0.0100", "0.600", "+0.100"],
        ["–", "0.500", "–"],
        ["+0.0300", "0.400", "-0.100"],
    ]


def test_methods_are_compared_with_clm_from_their_own_base():
    """Another processor's base of the same seed is another base."""
    made = files.Experiment("methods-tuned", "bash runs/methods.sh")
    for seed in (1, 2):
        for method, base in (
            ("clm", "a"),
            ("excess", "a"),
            ("clm", "b"),
            ("mile", "b"),
            ("dft", "c"),
        ):
            one = run(method, seed, "", 0.5, CLM_CURVE)
            one.inputs["init"] = base
            files.add(made, told_apart(one, made))
    names, runs, clm = methods.ranked(made)
    assert set(names) == {"clm", "excess", "mile"}
    assert [r.seed for r in runs["mile"]] == [1, 2]
    for name, base in (("clm", "a"), ("excess", "a"), ("mile", "b")):
        assert [methods.base_of(r) for r in clm[name]] == [(1, base), (2, base)]


def test_an_experiment_of_the_first_setting_has_the_same_table():
    made = experiment()
    made.experiment = "first-roundings"
    now, then = (tables.render(f"{first}roundings by-seed", made) for first in ("", files.FIRST))
    assert now == then and "first-roundings.json" in then[-1]
    with pytest.raises(UserError, match="no table is called 'first-nothing'"):
        tables.render("first-nothing", made)


def test_a_name_goes_to_the_right_of_a_point_that_has_another_at_its_left():
    places = [(0.0, 0.04), (-0.01, 0.039), (-0.02, 0.02), (-0.2, 0.04)]
    found = [figures.has_near_left(place, places) for place in places]
    assert found == [True, False, False, False]


def test_a_small_reference_that_costs_less_saves_more():
    made = files.Experiment("ablations", "")
    for seed in range(3):
        files.add(made, run("clm", seed, "", 0.2, CLM_CURVE))
        for method, size, cost in (("slm", 200, 150), ("slm-weak-28k", 20, 50 * seed)):
            files.add(made, run(method, seed, "", 0.9, SLM_CURVE))
            more = {"parameters": 200, "reference_parameters": size, "extra_tokens": cost}
            made.runs[-1].numbers.update(more)
    # CLM reads 300 tokens; SLM is at its final loss after 150.
    rows = cells_of(ablations.price(made))[2:]
    less = "-0.200 ± 0.000"
    assert rows[0] == ["200", "100%", "3", "150", less, "2.00", "1.00", "1.00", "1.00"]
    assert rows[1] == ["20", "10%", "3", "50", less, "2.00", "1.20", "1.50", "2.00"]


def test_a_figure_is_drawn_again_when_its_results_change(repository, stage):
    stage(results, "")
    made = demo_runs([CLM_CURVE] * 2, [SLM_CURVE] * 2)
    files.save(made)
    code, _, err = stage(results, "--check")
    assert code == 2 and err.startswith("error: figures/effect.svg: tables or figures are not")
    assert not (repository / "figures").exists()
    assert "made again: figures/effect.svg" in stage(results, "")[1]
    drawn = (repository / "figures/effect.svg").read_text()
    assert stage(results, "--check")[0] == 0

    made.runs[0].numbers["val_loss"] = 0.1
    files.save(made)
    assert stage(results, "--check")[0] == 2
    stage(results, "")
    assert (repository / "figures/effect.svg").read_text() != drawn


def test_the_demo_is_a_point_among_the_references():
    point = pays.of_demo(demo_runs([CLM_CURVE] * 2, [SLM_CURVE] * 2))
    # CLM ends at 0.4, SLM at 0.2, the reference stands at 0.3; a quarter of 300 tokens is before
    # the first validation.
    assert point.lead_at_end == pytest.approx(0.1)
    assert point.gain == (pytest.approx(0.2), pytest.approx(0.0))
    assert point.early_gain[0] == pytest.approx(0.1)


def test_readme_s_table_gives_means_intervals_and_the_span_of_what_is_saved():
    fast = [[60, 0.4], [300, 0.2]]
    rows = cells_of(demo.first_screen(demo_runs([CLM_CURVE] * 2, [SLM_CURVE, fast])))
    assert rows[2] == ["CLM, every token", "0.400 ± 0.000", "20% ± 0%", "", ""]
    assert rows[4][0] == "**SLM, k = 0.6**"
    assert rows[4][3:] == ["3.5 (2.0 to 5.0)", "1.2 (1.0 to 1.4)"]


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

    # A run that was collected later, with another commit's code, keeps its own.
    saved = json.loads((repository / "x/args.json").read_text())
    saved["made"] |= {"commit": "0123456789abcdef", "changed": ["slm.py"]}
    (repository / "x/args.json").write_text(json.dumps(saved))
    assert collected(repository / "x", "clm").made["commit"] == "0123456789+"


def test_what_cannot_be_added_changes_nothing(repository, stage):
    before = files.path_of("roundings").read_text()
    for flags, said in [
        ("--add new --run clm=x", "--command: got none"),
        ("--add roundings --run clm", "wanted METHOD=FOLDER"),
        ("--add roundings --run clm=x", "is not a run"),
        ("--add roundings --not-run avx", "wanted VARIANT: WHY"),
        ("--add Of_Ours --command c --not-run a:b", "small letters, digits and hyphens"),
    ]:
        code, _, err = stage(results, flags)
        assert code == 2 and said in err, err
    assert files.path_of("roundings").read_text() == before
    with pytest.raises(UserError, match="is not a run"):
        collected(repository, "clm")
