"""What the token page of tools/explore holds, and how it spells it."""

import json

import numpy as np

from conftest import write_set
from data import Loader, TokenSet
from explored import explored_run  # noqa: F401  (the fixture `run`)
from tools.explore import __main__ as tools_explore
from tools.explore import page as page_file
from tools.explore.spelling import spell
from training import finished


def test_characters_that_are_spread_over_tokens():
    party = "🎉".encode()
    tokens = [b"a", party[:2], party[2:] + b"b", b"\xff", b"c"]
    assert spell(tokens) == ["a", "⟨F0⟩⟨9F⟩", "🎉b", "⟨FF⟩", "c"]
    assert spell([party[:3]]) == ["⟨F0⟩⟨9F⟩⟨8E⟩"]
    assert spell([b"", b"x"]) == ["", "x"]
    assert spell(["\0\u202e\u200d\n\u2028é".encode()]) == ["␀⟨U+202E⟩\u200d↵\n⟨U+2028⟩é"]
    assert "".join(spell([bytes([b]) for b in "שלום 👩‍🎓".encode()])).endswith("🎓")


def test_the_page_holds_text_as_escaped_data(run, stage, tmp_path):
    page = {"words": ["</script><script>alert(1)</script>", "<!--", "&\u2028", "💥"]}
    html = page_file.fill(page)
    assert html.count("<script") == 2
    assert html.count("</script>") == 2
    assert "<!--" not in html
    assert "alert(1)<" not in html
    block = html.split('id="data">')[1].split("</script>")[0]
    assert json.loads(block) == page
    code, _, err = stage(
        tools_explore,
        f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/absent.bin "
        f"--out {tmp_path}/p.html",
    )
    assert code == 2
    assert "absent.bin does not exist" in err
    assert err.count("\n") == 1


def test_the_windows_shown_are_micro_batches_of_the_run(run, vocabulary, tmp_path):
    saved, data = finished.arguments(run / "slm"), TokenSet(run / "data")
    loader = Loader(data.n_windows(32), 6, saved["seed"])
    shown, batch, steps = page_file.choose_windows(saved, data, 12)
    assert np.array_equal(shown, [*loader.micro_batches(0, 3), *loader.micro_batches(7, 3)])
    assert batch == [0, 0, 1, 1] and steps == [0, 0, 7, 7]
    shown, batch, steps = page_file.choose_windows(
        saved, data, 3
    )  # less than a batch: no batch scope
    assert np.array_equal(shown, loader.micro_batches(7, 3)[:1])
    assert batch is None and steps == [7]
    other = write_set(tmp_path / "other", vocabulary, 300)
    shown, batch, _ = page_file.choose_windows(saved, other, 7)
    assert [list(s) for s in shown] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batch == [0, 0, 1]
