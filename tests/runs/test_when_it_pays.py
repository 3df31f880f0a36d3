"""runs/when_it_pays: the text, the table's numbers by hand, and the recipe run small."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

import runs.planetmath as planetmath
import train_slm
from common.errors import UserError
from conftest import HANGS, ROOT, SHARED
from forking import python_fixture  # noqa: F401
from runs import methods_on_real_text
from tools.results import files, pays
from tools.results.tables import render

ENTRY = r"""\documentclass{article}
\pmcreated{2013-03-22 15:53:44}
\pmowner{Alg}{128%d}
\endmetadata
\usepackage{amssymb}
%% a comment
\begin{document}
Theorem %d. Let $X$ be a finite family of sets.
  %% not this line
Every element of it has 50\%% of the property, %s.
\end{document}
"""


def entries(n=120):
    """Of two repositories; long enough to be curated."""
    words = "as one sees by induction on the size of the family and then by taking limits"
    texts = [ENTRY % (i, i, " ".join([words] * 4)) for i in range(n)]
    return [(f"planetmath/{i % 2}", f"{i}.tex", text) for i, text in enumerate(texts)]


# --------------------------------------------------------------------------------------------------
# the text


def test_a_body_by_hand():
    text = "head\n\\begin{document}\n% no\nOne. 50\\% of it.\n\t%% no\nTwo.\n\\end{document}\ntail"
    assert planetmath.body(text) == "One. 50\\% of it.\nTwo."
    assert planetmath.body("\\begin{document}cut off") == "cut off"
    assert planetmath.body("no such thing") == "no such thing"


def test_the_split_depends_on_names_alone_and_an_entry_is_in_one_part():
    sets = planetmath.split(entries())
    assert planetmath.split(entries()[::-1]) == sets
    sizes = {name: len(texts) for name, texts in sets.items()}
    assert sizes == {
        "base": 60,
        "corpus": 46,
        "bodies": 46,
        "curated": 10,
        "val": 4,
        "quarter": 3,
    }
    bodies = [planetmath.body(text) for text in sets["base"] + sets["corpus"]]
    everything = bodies + sets["curated"] + sets["val"]
    assert len(set(everything)) == len(everything) == 120
    assert sets["bodies"] == [planetmath.body(text) for text in sets["corpus"]]
    assert not any("pmcreated" in text for text in sets["bodies"] + sets["curated"] + sets["val"])
    assert all("pmcreated" in text for text in sets["base"] + sets["corpus"])
    assert set(sets["quarter"]) < set(sets["curated"])


def archive(name, texts):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for path, text in texts.items():
            info = tarfile.TarInfo(f"{name}-0123456/{path}")
            info.size = len(text.encode())
            packed.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_fetched_and_checked(tmp_path, monkeypatch):
    archives = {}
    wanted = []
    for name in planetmath.COMMITS:
        texts = {"a.tex": f"A of {name}", "sub/b.tex": "é", "README.md": "no"}
        archives[name] = archive(name, texts)
        for path in ("a.tex", "sub/b.tex"):
            wanted.append((f"planetmath/{name}", path, texts[path]))
    asked = []

    def download(url, name):
        asked.append(url)
        return archives[name.removesuffix(".tar.gz")]

    monkeypatch.setattr(planetmath.pinned, "download", download)
    with pytest.raises(UserError, match="hold another text than the pinned one"):
        planetmath.fetch(tmp_path)
    assert not (tmp_path / planetmath.FILE).exists()
    content = planetmath.as_lines(wanted)
    monkeypatch.setattr(planetmath, "SHA256", hashlib.sha256(content.encode()).hexdigest())
    planetmath.fetch(tmp_path)
    assert planetmath.read(tmp_path) == sorted(wanted)
    asked.clear()
    planetmath.fetch(tmp_path)
    assert not asked, "what is there was downloaded again"
    with pytest.raises(UserError, match="not a whole .tar.gz"):
        planetmath.entries_of("00_General", b"<html>")


def test_without_the_file_it_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no planetmath.jsonl and no planetmath.jsonl.zst"):
        planetmath.read(tmp_path)


def test_a_damaged_file_is_one_line(tmp_path):
    for content in (b"[1]\n", b'{"repo": "a"}\n', b"\xff\n", b""):
        (tmp_path / planetmath.FILE).write_bytes(content)
        with pytest.raises(UserError, match="no lines of repo, path and text"):
            planetmath.read(tmp_path)
    (tmp_path / planetmath.FILE).rename(tmp_path / f"{planetmath.FILE}.zst")
    with pytest.raises(UserError, match="no lines of repo, path and text"):
        planetmath.read(tmp_path)


def test_an_entry_may_hold_any_end_of_a_line(tmp_path):
    wanted = [("planetmath/a", "1.tex", "one\u2028two\x85three\r\nfour")]
    row = {"repo": "planetmath/a", "path": "1.tex", "text": wanted[0][2]}
    (tmp_path / planetmath.FILE).write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert planetmath.read(tmp_path) == wanted


@pytest.mark.skipif(
    not (SHARED / "corpus/planetmath.jsonl.zst").exists(), reason="needs ../shared/data"
)
def test_the_real_text_is_the_pinned_one_and_a_third_of_it_is_no_body():
    real = planetmath.read(SHARED / "corpus")
    assert len(real) == 5068 and planetmath.is_pinned(real)
    raw = sum(len(text) for _, _, text in real)
    bodies = sum(len(planetmath.body(text)) for _, _, text in real)
    assert 0.5 < bodies / raw < 0.75


# --------------------------------------------------------------------------------------------------
# the table


def run_of(method, seed, variant, curve, **numbers):
    numbers = {"val_loss": curve[-1][1], "tokens_seen": curve[-1][0], **numbers}
    return files.Run(method, seed, variant, numbers, curve, {}, {}, {})


def experiment(seeds=2):
    """CLM falls from 3 to 2 in 1,000 tokens; weak and strong references."""
    made = files.Experiment("when-it-pays", "bash runs/when_it_pays.sh")
    files.add(made, run_of("base", 0, "", [[0, 9.0], [5000, 3.0]]))
    for seed in range(seeds):
        up = seed / 8
        clm = [[0, 3.0], [500, 2.5], [1000, 2.0 + up]]
        files.add(made, run_of("clm", seed, "", clm))
        files.add(made, run_of("random", seed, "", [[0, 3.0], [1000, 2.25 + up]]))
        weak = {"reference_loss": 2.5, "extra_tokens": 300.0}
        late = [[0, 3.0], [500, 2.25], [1000, 2.125 + up]]
        files.add(made, run_of("slm", seed, "once 0.6", late, **weak))
        strong = {"reference_loss": 1.75, "extra_tokens": 600.0}
        fast = [[0, 3.0], [500, 2.0], [1000, 1.75 + up]]
        files.add(made, run_of("slm", seed, "clm 0.6", fast, **strong))
    return made


def test_gains_and_leads_by_hand():
    weak, strong = pays.points(experiment())
    assert (weak.name, weak.k, strong.name) == ("once", 0.6, "clm")
    assert weak.lead_at_start == 0.5 and strong.lead_at_start == 1.25
    assert weak.lead_at_end == 2.0625 - 2.5 and strong.lead_at_end == 2.0625 - 1.75
    assert weak.gain == (-0.125, 0.0), "the same loss of each seed"
    assert strong.gain == (0.25, 0.0)
    # After 250 of 1,000 tokens: CLM 2.75, weak 2.625, strong 2.5.
    assert weak.early_gain == (0.125, 0.0) and strong.early_gain == (0.25, 0.0)
    assert weak.fewer == weak.cheaper == [0.0, 0.0], "it never gets to CLM's final loss"
    assert strong.fewer == [1000 / 500, 1000 / (500 * (3.0 - 2.125) / 1.0)]
    assert strong.cheaper[0] == 1000 / (500 + 600)
    rows = render("when-it-pays", experiment())
    assert "| +0.250 ± 0.000 |" in rows[3] and "+0.312" in rows[3]
    (random,) = [line for line in render("when-it-pays others", experiment()) if "random" in line]
    assert "-0.250 ± 0.000" in random


def test_one_seed_has_no_interval():
    assert pays.points(experiment(seeds=1))[0].gain == (-0.125, None)


def test_a_loss_between_two_validations():
    curve = [[0, 4.0], [100, 3.0], [200, 1.0]]
    assert [pays.at(curve, tokens) for tokens in (0, 50, 100, 150, 900)] == [4, 3.5, 3, 2, 1]


# --------------------------------------------------------------------------------------------------
# the recipe


def test_a_method_runs_once_for_each_reference_that_it_looks_at():
    of = methods_on_real_text.flags_of
    assert of("dft", ["clm", "twice"], Path("o")) == {"o/method-dft": "--score dft --lr 2e-3"}
    found = of("clean", ["clm", "twice"], Path("o"))
    assert list(found) == ["o/method-clean-clm", "o/method-clean-twice"]
    slow = of("clm", ["clm"], Path("o"), "5e-4")
    assert slow == {"o/rate5e-4/method-clm": "--k 1.0 --lr 5e-4"}
    for folder, flags in found.items():
        args = train_slm.arguments(flags.split())
        reference = folder.rpartition("-")[2]
        assert (args.score, args.k, args.lr) == ("clean", 0.6, 2e-3)
        assert args.base_loss == "o/base_loss.bin"
        assert args.ref_loss == f"o/{reference}_ref_loss.bin"


@pytest.mark.slow
def test_recipe_runs_small_and_takes_up_what_is_done(python, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / planetmath.FILE).write_text(planetmath.as_lines(entries()))
    shape = "--n-layer 1 --d-model 32 --n-head 2"
    settings = {
        "DATA": raw,
        "MODEL": shape,
        "SMALLER": "--n-layer 1 --d-model 16 --n-head 2",
        "LARGER": "--n-layer 2 --d-model 32 --n-head 2",
        "VOCAB": 300,
        "WINDOW": 32,
        "BATCH": 4,
        "BASE_STEPS": 6,
        "STEPS": 6,
        "EVAL_EVERY": 2,
        "SEEDS": "0 1",
        "REFERENCES": "twice smaller clm",
        "MORE_KS": "0.4",
        "MORE": "twice larger",  # larger was not made: it is passed over
        "THREADS": 1,
        "PYTHON": python / "python",
        "KIT_RESULTS": tmp_path / "results",
        "TQDM_DISABLE": 1,
    }

    def recipe(*command, **changed):
        done = subprocess.run(
            ["bash", ROOT / "runs" / (command or ["when_it_pays.sh"])[0], *command[1:]],
            cwd=tmp_path,
            text=True,
            timeout=3 * HANGS,
            env=os.environ | {name: str(value) for name, value in (settings | changed).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    out = tmp_path / "out/pays"
    printed = recipe()
    report = (out / "report.md").read_text()
    assert report in printed
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    slm = 3 * 2 + 2  # three references at k 0.6, one of them at 0.4
    assert len(finished) == 2 + 3 + 2 * 4 + slm + 3 * 2, sorted(finished)
    stored = json.loads((tmp_path / "results/when-it-pays.json").read_text())
    variants = {run["variant"] for run in stored["runs"] if run["method"] == "slm"}
    assert variants == {
        "twice 0.6",
        "twice 0.4",
        "smaller 0.6",
        "clm 0.6",
        "twice, then old 0.6",
        "twice, then again 0.6",
    }
    joined = [run for run in stored["runs"] if run["variant"] == "twice, then old 0.6"]
    whole = [run for run in stored["runs"] if run["variant"] == "twice 0.6"]
    assert [run["numbers"]["tokens_seen"] for run in joined] == [
        run["numbers"]["tokens_seen"] for run in whole
    ]
    assert (out / "when-it-pays.svg").exists() and (out / "dynamics.json").exists()
    recipe(SEEDS="0", REFERENCES="twice")  # a part of it, which is done
    assert (out / "report.md").read_text() == report
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())

    printed = recipe("methods_on_real_text.sh", "clean ent", "--seeds", "0 1", REFERENCES="twice")
    made = json.loads((tmp_path / "results/methods-real-text.json").read_text())["runs"]
    assert {(run["method"], run["variant"]) for run in made} == {
        ("clm", ""),
        ("ent", ""),
        ("clean", "twice"),
        *(("excess", name) for name in ("twice", "smaller", "clm")),
    }
    extra = {run["method"]: run["numbers"].get("extra_tokens") for run in made if run["seed"] == 0}
    assert extra["ent"] == 0 and extra["clean"] > 0 and "| `clean`" in printed
