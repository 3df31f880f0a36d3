"""The token page of tools/explore in a real browser, and its picture of a passage."""

import base64
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import slm
from common.errors import UserError
from conftest import HANGS
from data import Stored, TokenSet
from explored import call, env, explored_run  # noqa: F401  (the fixture `run`)
from hf import checkpoint
from tools.explore import __main__ as tools_explore
from tools.explore import page as page_file
from tools.explore import passage
from tools.explore import runs as explore_run
from training import finished

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


# ---- the page in a browser


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip(
        "playwright.sync_api", reason="the browser tests need playwright (requirements-dev.txt)"
    )
    if CHROMIUM is None:
        pytest.skip("the browser tests need chromium (Debian: apt-get install chromium)")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def html(run):
    documents = " ".join(map(str, range(1, 60)))
    call(
        tools_explore,
        f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/ref_loss.bin "
        f"--out {run}/page.html --windows 48 --threads 1 --passage {run}/passage.svg "
        f"--documents {documents}",
    )
    return run / "page.html"


def test_the_passage_is_a_picture_of_what_slm_keeps(html, run):
    # Hostile text and all, it is well-formed XML.
    drawn = ElementTree.parse(run / "passage.svg").getroot()
    parts = {
        name: list(drawn.iter("{http://www.w3.org/2000/svg}" + name))
        for name in ("rect", "text", "script")
    }
    text = "".join(e.text for e in parts["text"])
    assert parts["script"] == []
    assert "script>" in text
    assert "onerror" in text
    assert "apples" in text

    def width(element):
        """Of a box, in characters."""
        return round(float(element.get("width")) / passage.CHAR)

    underlined = sum(width(e) for e in parts["rect"] if e.get("height") == "2")
    coloured = sum(width(e) for e in parts["rect"][1:] if e.get("height") != "2")
    data, kept = TokenSet(run / "data"), kept_by_slm(run, 0, "excess", "micro", 0.6)
    page = json.loads(html.read_text().split('id="data">')[1].split("</script>")[0])
    token = np.frombuffer(base64.b64decode(page["token"]), "<u2")

    def word(i):
        return page["spelt"].get(str(i), page["words"][token[i]]).replace("\n", "")

    shown = [r * 32 + j for r, start, end, _ in page["pieces"][:59] for j in range(start, end)]
    assert underlined == sum(len(word(i)) for i in shown if i in kept)
    assert underlined > 100
    assert coloured == sum(
        len(word(i)) for i in shown if data.valid([page["windows"][i // 32]], 32)[0, i % 32]
    )
    warm, cold = passage.colour(2.0), passage.colour(-2.0)
    assert passage.colour(0.0) == "#ffffff"
    assert warm != cold
    assert passage.colour(9) == "#f08a24"


def new_page(browser, **options):
    """A page of the browser that waits as long as a slow machine may need."""
    page = browser.new_page(**options)
    page.set_default_timeout(1000 * HANGS)
    return page


@pytest.fixture
def page(browser, html):
    page = new_page(browser, viewport={"width": 1200, "height": 800})
    page.problems, page.asked = [], []
    page.on(
        "console",
        lambda said: page.problems.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(html.as_uri())
    page.wait_for_selector(".t.k")
    yield page
    assert page.problems == []
    assert page.asked == [html.as_uri()]
    page.close()


def put(page, control, value):
    page.evaluate(
        """([id, value]) => { const e = document.getElementById(id); e.value = value;
        const kind = e.tagName === "INPUT" ? "input" : "change";
        e.dispatchEvent(new Event(kind, {bubbles: true})); }""",
        [control, str(value)],
    )


def kept_in(page):
    return set(page.evaluate("[...document.querySelectorAll('.t.k')].map(t => +t.dataset.i)"))


def kept_by_slm(run, snapshot, score_name, scope, k):
    """Positions in the page that slm.Selection keeps, from the model's and the stored values."""
    data, T = TokenSet(run / "data"), 32
    saved = finished.arguments(run / "slm")
    micro_batches, batch, steps = page_file.choose_windows(saved, data, 48)
    model = slm.WithLoss(checkpoint.load(explore_run.snapshots(run / "slm")[snapshot][1]))
    losses = [model(*map(torch.from_numpy, data.batch(m, T)[:2])) for m in micro_batches]
    if scope == "batch":
        micro_batches = [np.concatenate(micro_batches[i : i + 2]) for i in range(0, len(batch), 2)]
        losses = [torch.cat(losses[i : i + 2]) for i in range(0, len(batch), 2)]
    kept = []
    for windows, loss, step in zip(micro_batches, losses, steps):
        valid = data.valid(windows, T)
        tokens = slm.Tokens(loss=loss)
        rows = [np.random.RandomState([saved["seed"], step, w]).rand(T) for w in windows]
        tokens.noise = torch.from_numpy(np.stack(rows).astype(np.float32))
        for name in ("ref_loss", "ref_entropy"):
            stored = Stored(run / "ref_loss.bin", data, T, entropy=name == "ref_entropy")
            setattr(tokens, name, torch.from_numpy(stored.batch(windows, valid)))
        selection = slm.Selection(k, score_name, scope)
        kept.append(selection.mask(tokens, torch.from_numpy(valid)).flatten())
    return set(torch.cat(kept).nonzero().flatten().tolist())


def test_the_page_keeps_what_slm_keeps(page, run):
    assert kept_in(page) == kept_by_slm(run, 2, "excess", "micro", 0.6)
    seen = set()
    for snapshot, name, scope, k in [
        (0, "excess", "micro", 0.3),
        (1, "excess", "sequence", 0.6),
        (2, "excess", "batch", 0.7),
        (1, "loss", "batch", 0.05),
        (0, "ref_loss", "micro", 0.6),
        (2, "ref_entropy", "sequence", 0.45),
        (2, "ref_and", "micro", 0.6),
        (1, "ref_or", "batch", 0.5),
        (0, "excess", "micro", 1),
    ]:
        for control, value in (("snap", snapshot), ("score", name), ("scope", scope), ("k", k)):
            put(page, control, value)
        kept = kept_in(page)
        assert kept == kept_by_slm(run, snapshot, name, scope, k), (snapshot, name, scope, k)
        seen.add(frozenset(kept))
    assert len(seen) == 9


def test_a_run_that_ranked_by_another_score_shows_that_one(run, browser, monkeypatch):
    """A random score, and one of the reader's own, which the page cannot compute by itself."""
    middle = slm.Score(lambda t: -(t.loss - t.ref_loss).abs(), needs=("loss", "ref_loss"))
    monkeypatch.setitem(slm.SCORES, "middle", middle)
    file = run / "slm/args.json"
    saved = json.loads(file.read_text())
    try:
        for name in ("random", "middle", "loss"):
            file.write_text(json.dumps({**saved, "score": name}))
            call(
                tools_explore,
                f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/ref_loss.bin "
                f"--out {run}/{name}.html --windows 48 --threads 1",
            )
            shown = new_page(browser)
            shown.goto((run / f"{name}.html").as_uri())
            assert shown.evaluate("document.querySelector('#score').value") == name
            assert kept_in(shown) == kept_by_slm(run, 2, name, "micro", 0.6)
            shown.close()
        file.write_text(json.dumps({**saved, "score": "nobody's"}))
        with pytest.raises(UserError, match="ranked by nobody's, which SCORES of slm.py does not"):
            call(
                tools_explore,
                f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/ref_loss.bin "
                f"--out {run}/none.html --windows 48 --threads 1",
            )
    finally:
        file.write_text(json.dumps(saved))


def test_a_score_whose_values_are_missing_is_said(capsys):
    known = {"ref_loss": 1.0, "ref_entropy": None}
    assert page_file.score_shown(0.6, "ref_and", known) == "excess"
    assert "ranked by ref_and; without its ref_entropy the page" in capsys.readouterr().out
    assert page_file.score_shown(0.6, "ref_loss", known) == "ref_loss"
    assert page_file.score_shown(1, "nobody's", known) == "excess"


def test_the_controls_change_what_is_shown(page, run):
    before = kept_in(page)
    page.locator("#k").focus()
    page.keyboard.press("ArrowLeft")
    assert len(kept_in(page)) < len(before)
    assert page.text_content("#k_out") == "0.55"
    colours = """[...document.querySelectorAll('.t[data-i]')]
        .map(t => getComputedStyle(t).backgroundColor).join()"""
    seen = {page.evaluate(colours)}
    page.locator("#snap").focus()
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#snap_out") == "4 steps"
    seen.add(page.evaluate(colours))
    for mode in ("loss", "ref", "entropy", "kept"):
        page.select_option("#mode", mode)
        seen.add(page.evaluate(colours))
    page.click("#theme")
    seen.add(page.evaluate(colours))
    assert len(seen) == 7
    page.select_option("#mode", "excess")
    shown = "[...document.querySelectorAll('article:not([hidden])')].length"
    everything, histogram = page.evaluate(shown), page.inner_html("#histogram")
    page.click("#none")
    assert page.evaluate(shown) == 0
    page.check('[data-kind="hostile"]')
    assert 0 < page.evaluate(shown) < everything
    assert page.inner_html("#histogram") != histogram
    page.click("#all")
    page.select_option("#source", label="word problems")
    assert 0 < page.evaluate(shown) < everything
    page.select_option("#source", label="all")
    order = "[...document.querySelectorAll('article:not([hidden])')].map(a => a.mean)"
    page.select_option("#sort", "high")
    high = page.evaluate(order)
    assert high == sorted(high, reverse=True)
    assert len(set(high)) > 3
    page.select_option("#sort", "low")
    assert page.evaluate(order) == sorted(high)


def test_hover_and_keyboard_show_a_tokens_numbers(page, run):
    data, i = TokenSet(run / "data"), 40
    window = int(page_file.choose_windows(finished.arguments(run / "slm"), data, 48)[0][0][1])
    found = explore_run.look(run / "slm", data, [[window]], 32, env(), top=3)
    j = i - 32
    position = window * 32 + 1 + j
    assert data.loss_mask[position]
    page.hover(f".t[data-i='{i}']")
    text = page.inner_text("#details")
    reference = float(Stored(run / "ref_loss.bin", data, 32).values[position])
    assert f"{found['loss'][0, j]:.3f}" in text
    assert f"{reference:.3f}" in text
    assert f"{found['top_p'][0, j, 0]:.2f}" in text
    assert data.kinds[data.kind[position]] in text
    focused = "document.activeElement.dataset.i"
    page.click(f".t[data-i='{i}']")
    assert page.evaluate(focused) == str(i)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(i + 1)
    assert page.inner_text("#details") != text
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == str(i)
    assert page.inner_text("#details") == text
    page.keyboard.press("ArrowDown")
    assert int(page.evaluate(focused)) > i + 1
    page.keyboard.press("End")
    assert int(page.evaluate(focused)) > i + 2
    assert page.evaluate("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1


def test_text_is_shown_and_never_executed(page, run, vocabulary):
    data, T = TokenSet(run / "data"), 32
    assert page.evaluate("window.hacked") is None
    assert (
        page.evaluate(
            "document.querySelectorAll('#text img, #text script, #text i, #source i').length"
        )
        == 0
    )
    assert page.locator("#source option", has_text="<i>nasty</i>").count() == 1
    shown = page.evaluate(
        "[...document.querySelectorAll('.t[data-i]')].map(t => [+t.dataset.i, t.textContent])"
    )
    rows = np.concatenate(page_file.choose_windows(finished.arguments(run / "slm"), data, 48)[0])
    every = "".join(text for _, text in shown)
    assert not set(every) & set(
        "\0\u202e\u2066\u200b\x1b\u2028"
    )  # nothing that hides or reorders text
    whole = 0
    for r, window in enumerate(rows):  # what is shown, its marks taken back, is the text
        text = "".join(text for i, text in shown if i // T == r)
        text = re.sub(
            "(⟨[0-9A-F]{2}⟩)+(?=[^⟨]|⟨U)", "", text
        )  # the first bytes of a character that follows
        if re.search("⟨[0-9A-F]{2}⟩", text):
            continue  # a character begins here and ends elsewhere
        text = re.sub("⟨U\\+([0-9A-F]{4})⟩", lambda m: chr(int(m[1], 16)), text).replace(
            "↵\n", "\n"
        )
        text = re.sub("[\u2400-\u241f]", lambda m: chr(ord(m[0]) - 0x2400), text)
        wanted = vocabulary.decode(data.tokens[window * T + 1 : window * T + T + 1])
        whole += wanted in text and "\ufffd" not in wanted
        assert text == wanted or "\ufffd" in wanted
    assert whole > 30
    for part in (
        "script>",
        "onerror",
        "␀",
        "⟨U+202E⟩",
        "⟨U+2066⟩",
        "🎉",
        "ש",
        "م",
        "&lt;",
        "⟨U+2028⟩",
    ):
        assert part in every, part


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_text_is_readable_on_every_colour(page):
    """WCAG's contrast ratio of text on its background is 4.5 or more in all themes and modes."""
    ratio = """() => {
        const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const light = c => {
          const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(linear);
          return .2126 * r + .7152 * g + .0722 * b + .05;
        };
        const paper = getComputedStyle(document.body).backgroundColor;
        let worst = 99;
        for (const t of document.querySelectorAll('.t')) {
          const s = getComputedStyle(t);
          const clear = /, 0\\)/.test(s.backgroundColor);
          const a = light(s.color);
          const b = light(clear ? paper : s.backgroundColor);
          worst = Math.min(worst, Math.max(a, b) / Math.min(a, b));
        }
        return worst;
      }"""
    for _ in ("light", "dark"):
        for mode in ("excess", "loss", "ref", "entropy", "kept"):
            page.select_option("#mode", mode)
            assert page.evaluate(ratio) >= 4.5, mode
        page.click("#theme")
