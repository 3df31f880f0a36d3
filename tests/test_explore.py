"""tools/explore: the token page (in a real browser too), token dynamics, curves, the suggestion for k."""
import argparse
import base64
import json
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import write_model, write_set

import runs.ablations
import score
import slm
import tools.explore
import train_slm
import weights
from data import Loader, Stored, TokenSet, TokenSetWriter
from runtime import Env, UserError
from tools import explore_dynamics, explore_k, explore_page, explore_passage, explore_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = ["<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></script>",
           "null \0 byte, \u202eoverride\u202c, \u2066isolate\u2069, \u200bzero width, \x1b[31m", "emoji 👩‍🎓 and 🎉é",
           "שלום עולם, مرحبا بالعالم 123", "&lt;b&gt; &amp; \u2028 <!-- <script> --> ]]> {{x}}"]


@pytest.fixture(scope="module")
def run(vocabulary, tmp_path_factory):
    """A small selective run with snapshots on labelled text of two sources, some of it masked, and stored losses with
    many ties: the folder that holds data, base, ref, ref_loss.bin and slm."""
    root = tmp_path_factory.mktemp("explore")
    documents = HOSTILE * 3 + ["Tom has 3 apples and buys 4 more. How many apples? 3+4=7 #### 7\n"] * 25
    ids = [np.append(vocabulary.encode(text), vocabulary.eos_id) for text in documents]
    tokens = np.concatenate(ids)
    writer = TokenSetWriter(root / "data", vocabulary.n_vocab, ("tokens", "loss_mask", "kind"))
    writer.append(tokens=tokens, loss_mask=np.arange(len(tokens)) % 11 > 0,
                  kind=np.repeat(np.arange(len(ids)) < len(HOSTILE) * 3, [len(i) for i in ids]))
    vocabulary.save(root / "data")
    sizes = [sum(len(i) for i in part) for part in (ids[:15], ids[15:])]
    writer.finish(tokenizer=vocabulary.hash, seed=0, kinds=["plain", "hostile"],
                  sources=[{"name": name, "documents": 0, "tokens": n} for name, n in zip(("<i>nasty</i>", "word problems"), sizes)])
    write_model(root / "base", vocabulary, seed=1, num_hidden_layers=1)
    write_model(root / "ref", vocabulary, seed=2, num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        for module, arguments in (
                (score, f"--model {root}/ref --data {root}/data --out {root}/ref_loss.bin --seq-len 32 --entropy"),
                (train_slm, f"--data {root}/data --val {root}/data --init {root}/base --ref-loss {root}/ref_loss.bin "
                            f"--out {root}/slm --seq-len 32 --batch-size 6 --micro-batch-size 3 --steps 8 --snapshots 2 "
                            f"--lr 1e-2 --eval-every 2"),):
            if module is train_slm:
                for name in ("ref_loss.bin", "ref_entropy.bin"):
                    values = np.memmap(root / name, "<f2", "r+")
                    values[:] = np.rint(values * 4) / 4     # ties, and NaN stays NaN
                    values.flush()
            patch.setattr("sys.argv", [module.__name__, *arguments.split()])
            module.main()
    return root


@pytest.fixture
def explore(stage):
    return lambda arguments: stage(tools.explore, arguments)


def env():
    return Env(argparse.Namespace(device="cpu", dtype="auto", threads=1))


# ---- what the models say

def test_snapshots_and_their_losses(run, explore):
    data = TokenSet(run / "data")
    found = explore_run.snapshots(run / "slm")
    assert [(step, path.name) for step, path in found] == [(0, "base"), (4, "step-000004"), (8, "slm")]
    batches = [[3, 1], [0]]
    got = explore_run.look(found[1][1], data, batches, 32, env(), top=3)
    model = weights.load(found[1][1])
    x, y, _ = data.batch([3, 1, 0], 32)
    log_p = model.logits(torch.from_numpy(x)).double().log_softmax(-1)
    assert np.allclose(got["loss"], -log_p.gather(-1, torch.from_numpy(y)[..., None])[..., 0].detach(), atol=1e-4)
    assert np.allclose(got["entropy"], -(log_p.exp() * log_p).sum(-1).detach(), atol=1e-4)
    assert np.array_equal(got["top_id"], log_p.topk(3).indices) and np.allclose(got["top_p"], log_p.topk(3).values.exp().detach(), atol=1e-5)
    assert np.allclose(explore_run.look(found[1][1], data, batches, 32, env())["loss"], got["loss"], atol=1e-5)
    code, _, err = explore(f"dynamics --run {run} --data {run}/data --out x")
    assert code == 2 and "is not a run" in err and err.count("\n") == 1


# ---- dynamics (section 2.1)

def test_every_synthetic_token_lands_in_its_class():
    x, rng = np.arange(11), np.random.RandomState(0)
    wave = .05 * np.sin(3 * x)
    known = {0: 3 - .2 * x, 1: .1 + wave, 2: 5 + wave, 3: 1 + .1 * x}
    category = np.repeat([0, 1, 2, 3], [26, 51, 11, 12])
    rng.shuffle(category)
    losses = np.stack([known[c] for c in category], 1) + .01 * rng.randn(11, 100)
    assert (explore_dynamics.classify(losses) == category).all()
    assert explore_dynamics.shares(category)["all"] == explore_dynamics.PAPER      # 26, 51, 11, 12 %
    by_kind = explore_dynamics.shares(category, (category == 2).astype(int), ["rest", "digits"])
    assert by_kind["digits"] == {"H→L": 0, "L→L": 0, "H→H": 1, "L→H": 0}


def test_the_change_is_the_fitted_lines_and_not_the_ends():
    rng = np.random.RandomState(1)
    losses = rng.rand(7, 500) * 2
    change = np.polyfit(np.arange(7), losses, 1)[0] * 6
    wanted = np.select([change < -.2, change > .2, losses[-1] <= losses[-1].mean()], [0, 3, 1], 2)
    assert (explore_dynamics.classify(losses) == wanted).all() and len(set(wanted)) == 4
    late = np.array([[1, 1, 1, 1, 1, .7], [2] * 6]).T        # falls by 0.3 at the end, its line by 0.21
    early = np.array([[.7, 1, 1, 1, 1, .7], [2] * 6]).T      # ends where it began
    assert list(explore_dynamics.classify(late)) == [0, 2] and list(explore_dynamics.classify(early)) == [1, 2]
    with pytest.raises(UserError, match="at least 2"):
        explore_dynamics.classify(losses[:1])


def test_dynamics_of_a_run(run, explore, tmp_path):
    code, out, err = explore(f"dynamics --run {run}/slm --data {run}/data --out {tmp_path}/d --tokens 500 --threads 1")
    assert code == 0, err
    result = json.loads((tmp_path / "d.json").read_text())
    data, windows = TokenSet(run / "data"), np.array(explore_run.spaced(range(TokenSet(run / "data").n_windows(32)), 15))
    valid = data.valid(windows, 32)
    losses = [explore_run.look(path, data, [windows], 32, env())["loss"][valid] for _, path in explore_run.snapshots(run / "slm")]
    category = explore_dynamics.classify(np.stack(losses))
    assert result["tokens"] == valid.sum() and result["steps"] == [0, 4, 8]
    assert result["shares"]["all"] == pytest.approx({c: (category == i).mean() for i, c in enumerate(explore_dynamics.CATEGORIES)}, abs=1e-3)
    assert set(result["shares"]) == {"all", "plain", "hostile"} and "| the paper | 26% | 51% | 11% | 12% |" in out
    assert (tmp_path / "d.png").stat().st_size > 10_000 and "<svg" in (tmp_path / "d.svg").read_text()
    code, _, err = explore(f"dynamics --run {run}/slm/step-000004 --data {run}/data --out {tmp_path}/d")
    assert code == 2 and "is not a run" in err


# ---- curves

def write_log(folder, losses, tokens=100, **changes):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"k": 1.0, "steps": len(losses), "init": "x", "batch_size": 2,
                                                  "micro_batch_size": 2, "seq_len": 50, "inputs": {}, **changes}))
    (folder / "log.jsonl").write_text("".join(json.dumps(
        {"step": i + 1, "tokens_seen": tokens * (i + 1), "loss": l, "loss_selected": l, "val_loss": l,
         "kept": {"clean": .9, "noise": .1 * l}}) + "\n"
        for i, l in enumerate(losses)))
    (folder / "summary.json").write_text(json.dumps({"val_loss": losses[-1], "exact_match": None,
                                                     "tokens_seen": tokens * len(losses), "tokens_selected": 1}))
    return folder


def test_tokens_and_cost_to_reach_the_baseline(vocabulary, tmp_path, explore):
    clm = write_log(tmp_path / "clm", [4.0, 3.0, 2.5, 2.0])
    shared = {"k": .6, "score": "excess", "scope": "micro", "ref_loss": str(tmp_path / "ref_loss.bin")}
    small = write_model(tmp_path / "ref", vocabulary, seed=3, num_hidden_layers=1)
    large = write_model(tmp_path / "model", vocabulary, seed=4, num_hidden_layers=2)
    (tmp_path / "ref/summary.json").write_text(json.dumps({"tokens_seen": 60}))
    (tmp_path / "ref_loss.json").write_text(json.dumps({"count": 90}))
    slm_run = write_log(tmp_path / "slm", [3.0, 1.0, .9, .8], **shared,
                        inputs={"ref_loss": weights.model_hash(tmp_path / "ref")})
    never = write_log(tmp_path / "never", [4.0, 3.5, 3.0, 2.9], **{**shared, "score": "random"})
    shutil.copy(tmp_path / "model/config.json", slm_run)
    code, out, err = explore(f"curves --run CLM={clm} --run SLM={slm_run} --run random={never} --baseline CLM --out {tmp_path}/c")
    assert code == 0, err
    result = json.loads((tmp_path / "c.json").read_text())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
    fixed = (60 + 90 / 3) * sizes[0] / sizes[1]        # the reference's training, and a third of it for scoring
    assert result["SLM"]["tokens_to_reach"] == [150]  # halfway from 3.0 after 100 to 1.0 after 200
    assert result["SLM"]["times_fewer_tokens"] == [round(400 / 150, 2)]
    assert result["SLM"]["fixed_cost"] == [round(fixed)]
    assert result["SLM"]["times_less_cost"] == [round(400 / (fixed + 150), 2)]
    assert result["random"]["fixed_cost"] == [0] and result["random"]["tokens_to_reach"] == [None]
    assert "never" in out and all((tmp_path / f"c{name}").stat().st_size > 5000 for name in (
        ".png", ".svg", "-training.png", "-training.svg", "-kept.png", "-kept.svg"))
    (tmp_path / "ref/summary.json").unlink()
    code, _, err = explore(f"curves --run SLM={slm_run} --out {tmp_path}/c")
    assert code == 2 and "--reference" in err and err.count("\n") == 1
    code, _, err = explore(f"curves --run CLM={clm} --baseline clm --out {tmp_path}/c")
    assert code == 2 and "wanted one of CLM" in err


# ---- ablations

def test_the_narrow_reference_sees_one_template(stage, tmp_path):
    code, _, err = stage(runs.ablations, f"narrow --seed 3 --out {tmp_path}/narrow.jsonl")
    assert code == 0, err
    texts = [json.loads(line)["text"] for line in (tmp_path / "narrow.jsonl").read_text().splitlines()]
    pattern = re.compile(r"Q: \w+ has (\d) \w+ and buys (\d) more\. Then \w+ takes (\d) away\. How many \w+ are left\?\n"
                         r"A: \1\+\2=(\d+)\n \4-\3=(\d+)\n #### \5\n")
    found = [pattern.fullmatch(text) for text in texts]
    assert len(texts) == 800 and all(found)
    assert all(int(m[1]) + int(m[2]) == int(m[4]) and int(m[4]) - int(m[3]) == int(m[5]) for m in found)


def test_an_ablations_table(stage, tmp_path):
    for seed, losses in ((1, [3.0, 2.0, 1.5]), (2, [3.0, 2.0, 1.7])):
        out = tmp_path / f"out/demo-seed{seed}/steps3"
        write_log(out / "clm", [4.0, 3.0, 2.0])
        write_log(out / "slm", losses)
        write_log(out / "random", [4.0, 3.5, 3.0 + seed])
    code, out, err = stage(runs.ablations, "table --name score --seeds 1 2 --steps 3")
    assert code == 0, err
    assert "| excess | 1.600 (1.500 to 1.700) | – | 1.5 (1.5 to 1.5) |" in out
    assert "| random | 4.500 (4.000 to 5.000) | – | – |" in out
    assert "left out: " in out and "demo-seed2/steps3/ref_and" in out and "| both" not in out
    assert (tmp_path / "figures/ablation-score.png").exists()
    code, _, err = stage(runs.ablations, "table --name k --seeds 9")
    assert code == 2 and "none of the runs is finished" in err


# ---- pick-k

def test_the_suggestion_is_the_share_that_the_reference_does_not_lose(run, explore):
    excess = np.concatenate([np.full(560, .01), np.full(40, -.19), np.full(400, -2.0)])
    assert explore_k.suggestion(excess) == .6 and explore_k.suggestion(np.full(9, -5.0)) == .01
    code, out, err = explore(f"pick-k --ref-loss {run}/ref_loss.bin --data {run}/data --model {run}/base --windows 9999")
    assert code == 0, err
    data = TokenSet(run / "data")
    windows = np.arange(data.n_windows(32))
    valid = data.valid(windows, 32)
    loss = slm.WithLoss(weights.load(run / "base"))(*map(torch.from_numpy, data.batch(windows, 32)[:2]))
    excess = (loss.numpy() - Stored(run / "ref_loss.bin", data, 32).batch(windows, valid))[valid]
    assert f"--k {round((excess > -.2).mean(), 2):g} " in out and f"{valid.sum():,} targets" in out and "| hostile |" in out


# ---- the page: its text

def test_characters_that_are_spread_over_tokens():
    party = "🎉".encode()
    assert explore_page.spell([b"a", party[:2], party[2:] + b"b", b"\xff", b"c"]) == ["a", "⟨F0⟩⟨9F⟩", "🎉b", "⟨FF⟩", "c"]
    assert explore_page.spell([party[:3]]) == ["⟨F0⟩⟨9F⟩⟨8E⟩"] and explore_page.spell([b"", b"x"]) == ["", "x"]
    assert explore_page.spell(["\0\u202e\u200d\n\u2028é".encode()]) == ["␀⟨U+202E⟩\u200d↵\n⟨U+2028⟩é"]
    assert "".join(explore_page.spell([bytes([b]) for b in "שלום 👩‍🎓".encode()])).endswith("🎓")


def test_the_page_holds_text_as_escaped_data(run, explore, tmp_path):
    page = {"words": ["</script><script>alert(1)</script>", "<!--", "&\u2028", "💥"]}
    html = explore_page.fill(page)
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<!--" not in html and "alert(1)<" not in html
    block = html.split('id="data">')[1].split("</script>")[0]
    assert json.loads(block) == page
    code, _, err = explore(f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/absent.bin --out {tmp_path}/p.html")
    assert code == 2 and "absent.bin does not exist" in err and err.count("\n") == 1


def test_the_windows_shown_are_micro_batches_of_the_run(run, vocabulary, tmp_path):
    saved, data = explore_run.run_arguments(run / "slm"), TokenSet(run / "data")
    loader = Loader(data.n_windows(32), 6, 0)
    shown, batch = explore_page.choose_windows(saved, data, 12)
    assert np.array_equal(shown, [*loader.micro_batches(0, 3), *loader.micro_batches(7, 3)]) and batch == [0, 0, 1, 1]
    shown, batch = explore_page.choose_windows(saved, data, 3)     # less than a batch: no batch scope
    assert np.array_equal(shown, loader.micro_batches(7, 3)[:1]) and batch is None
    other = write_set(tmp_path / "other", vocabulary, 300)
    shown, batch = explore_page.choose_windows(saved, other, 7)
    assert [list(s) for s in shown] == [[0, 1, 2], [3, 4, 5], [6]] and batch == [0, 0, 1]


# ---- the page in a browser

@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright (requirements-dev.txt)")
    if CHROMIUM is None:
        pytest.skip("the browser tests need chromium (Debian: apt-get install chromium)")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def html(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["explore", *f"tokens --run {run}/slm --data {run}/data --ref-loss {run}/ref_loss.bin "
                                               f"--out {run}/page.html --windows 48 --threads 1 "
                                               f"--passage {run}/passage.svg --documents {' '.join(map(str, range(1, 60)))}"
                                               .split()])
        tools.explore.main()
    return run / "page.html"


def test_the_passage_is_a_picture_of_what_slm_keeps(html, run):
    drawn = ElementTree.parse(run / "passage.svg").getroot()          # hostile text and all, it is well-formed XML
    parts = {name: [e for e in drawn.iter("{http://www.w3.org/2000/svg}" + name)] for name in ("rect", "text", "script")}
    text = "".join(e.text for e in parts["text"])
    assert parts["script"] == [] and "script>" in text and "onerror" in text and "apples" in text
    width = lambda e: round(float(e.get("width")) / explore_passage.CHAR)
    underlined = sum(width(e) for e in parts["rect"] if e.get("height") == "2")
    coloured = sum(width(e) for e in parts["rect"][1:] if e.get("height") != "2")
    data, kept = TokenSet(run / "data"), kept_by_slm(run, 0, "excess", "micro", .6)
    page = json.loads(html.read_text().split('id="data">')[1].split("</script>")[0])
    token = np.frombuffer(base64.b64decode(page["token"]), "<u2")
    word = lambda i: page["spelt"].get(str(i), page["words"][token[i]]).replace("\n", "")
    shown = [r * 32 + j for r, start, end, _ in page["pieces"][:59] for j in range(start, end)]
    assert underlined == sum(len(word(i)) for i in shown if i in kept) and underlined > 100
    assert coloured == sum(len(word(i)) for i in shown if data.valid([page["windows"][i // 32]], 32)[0, i % 32])
    warm, cold = explore_passage.colour(2.0), explore_passage.colour(-2.0)
    assert explore_passage.colour(0.0) == "#ffffff" and warm != cold and explore_passage.colour(9) == "#f08a24"


@pytest.fixture
def page(browser, html):
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.problems, page.asked = [], []
    page.on("console", lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(html.as_uri())
    page.wait_for_selector(".t.k")
    yield page
    assert page.problems == [] and page.asked == [html.as_uri()]
    page.close()


def put(page, control, value):
    page.evaluate("""([id, value]) => { const e = document.getElementById(id); e.value = value;
        e.dispatchEvent(new Event(e.tagName === "INPUT" ? "input" : "change", {bubbles: true})); }""", [control, str(value)])


def kept_in(page):
    return set(page.evaluate("[...document.querySelectorAll('.t.k')].map(t => +t.dataset.i)"))


def kept_by_slm(run, snapshot, score_name, scope, k):
    """What slm.choose keeps of the page's windows, from the model's and the stored values; positions in the page."""
    data, T = TokenSet(run / "data"), 32
    saved = explore_run.run_arguments(run / "slm")
    micro_batches, batch = explore_page.choose_windows(saved, data, 48)
    model = slm.WithLoss(weights.load(explore_run.snapshots(run / "slm")[snapshot][1]))
    losses = [model(*map(torch.from_numpy, data.batch(m, T)[:2])) for m in micro_batches]
    if scope == "batch":
        micro_batches = [np.concatenate(micro_batches[i : i + 2]) for i in range(0, len(batch), 2)]
        losses = [torch.cat(losses[i : i + 2]) for i in range(0, len(batch), 2)]
    kept = []
    for windows, loss in zip(micro_batches, losses):
        valid = data.valid(windows, T)
        stored = [torch.from_numpy(Stored(run / "ref_loss.bin", data, T, entropy=e).batch(windows, valid)) for e in (False, True)]
        kept.append(slm.choose(slm.Tokens(loss, *stored), torch.from_numpy(valid), k, score_name, scope).flatten())
    return set(torch.cat(kept).nonzero().flatten().tolist())


def test_the_page_keeps_what_slm_keeps(page, run):
    assert kept_in(page) == kept_by_slm(run, 2, "excess", "micro", .6)
    seen = set()
    for snapshot, name, scope, k in [(0, "excess", "micro", .3), (1, "excess", "sequence", .6), (2, "excess", "batch", .7),
                                     (1, "loss", "batch", .05), (0, "ref_loss", "micro", .6), (2, "ref_entropy", "sequence", .45),
                                     (2, "ref_and", "micro", .6), (1, "ref_or", "batch", .5), (0, "excess", "micro", 1)]:
        for control, value in (("snap", snapshot), ("score", name), ("scope", scope), ("k", k)):
            put(page, control, value)
        kept = kept_in(page)
        assert kept == kept_by_slm(run, snapshot, name, scope, k), (snapshot, name, scope, k)
        seen.add(frozenset(kept))
    assert len(seen) == 9


def test_the_controls_change_what_is_shown(page, run):
    before = kept_in(page)
    page.locator("#k").focus()
    page.keyboard.press("ArrowLeft")
    assert len(kept_in(page)) < len(before) and page.text_content("#k_out") == "0.55"
    colours = "[...document.querySelectorAll('.t[data-i]')].map(t => getComputedStyle(t).backgroundColor).join()"
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
    assert 0 < page.evaluate(shown) < everything and page.inner_html("#histogram") != histogram
    page.click("#all")
    page.select_option("#source", label="word problems")
    assert 0 < page.evaluate(shown) < everything
    page.select_option("#source", label="all")
    order = "[...document.querySelectorAll('article:not([hidden])')].map(a => a.mean)"
    page.select_option("#sort", "high")
    high = page.evaluate(order)
    assert high == sorted(high, reverse=True) and len(set(high)) > 3
    page.select_option("#sort", "low")
    assert page.evaluate(order) == sorted(high)


def test_hover_and_keyboard_show_a_tokens_numbers(page, run):
    data, i = TokenSet(run / "data"), 40
    window = int(explore_page.choose_windows(explore_run.run_arguments(run / "slm"), data, 48)[0][0][1])
    found = explore_run.look(run / "slm", data, [[window]], 32, env(), top=3)
    j = i - 32
    position = window * 32 + 1 + j
    assert data.loss_mask[position]
    page.hover(f".t[data-i='{i}']")
    text = page.inner_text("#details")
    assert f"{found['loss'][0, j]:.3f}" in text and f"{float(Stored(run / 'ref_loss.bin', data, 32).values[position]):.3f}" in text
    assert f"{found['top_p'][0, j, 0]:.2f}" in text and data.kinds[data.kind[position]] in text
    focused = "document.activeElement.dataset.i"
    page.click(f".t[data-i='{i}']")
    assert page.evaluate(focused) == str(i)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(i + 1) and page.inner_text("#details") != text
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == str(i) and page.inner_text("#details") == text
    page.keyboard.press("ArrowDown")
    assert int(page.evaluate(focused)) > i + 1
    page.keyboard.press("End")
    assert int(page.evaluate(focused)) > i + 2
    assert page.evaluate("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1


def test_text_is_shown_and_never_executed(page, run, vocabulary):
    data, T = TokenSet(run / "data"), 32
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('#text img, #text script, #text i, #source i').length") == 0
    assert page.locator("#source option", has_text="<i>nasty</i>").count() == 1
    shown = page.evaluate("[...document.querySelectorAll('.t[data-i]')].map(t => [+t.dataset.i, t.textContent])")
    rows = np.concatenate(explore_page.choose_windows(explore_run.run_arguments(run / "slm"), data, 48)[0])
    every = "".join(text for _, text in shown)
    assert not set(every) & set("\0\u202e\u2066\u200b\x1b\u2028")     # nothing that hides or reorders text
    whole = 0
    for r, window in enumerate(rows):     # what is shown, its marks taken back, is the text
        text = "".join(text for i, text in shown if i // T == r)
        text = re.sub("(⟨[0-9A-F]{2}⟩)+(?=[^⟨]|⟨U)", "", text)       # the first bytes of a character that follows
        if re.search("⟨[0-9A-F]{2}⟩", text):
            continue                                                 # a character begins here and ends elsewhere
        text = re.sub("⟨U\\+([0-9A-F]{4})⟩", lambda m: chr(int(m[1], 16)), text).replace("↵\n", "\n")
        text = re.sub("[\u2400-\u241f]", lambda m: chr(ord(m[0]) - 0x2400), text)
        wanted = vocabulary.decode(data.tokens[window * T + 1 : window * T + T + 1])
        whole += wanted in text and "\ufffd" not in wanted
        assert text == wanted or "\ufffd" in wanted
    assert whole > 30
    for part in ("script>", "onerror", "␀", "⟨U+202E⟩", "⟨U+2066⟩", "🎉", "ש", "م", "&lt;", "⟨U+2028⟩"):
        assert part in every, part


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_text_is_readable_on_every_colour(page):
    """WCAG's contrast ratio of text on its background, at least 4.5, in both themes and all modes."""
    ratio = """() => { const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
          return .2126 * r + .7152 * g + .0722 * b + .05; };
        const paper = getComputedStyle(document.body).backgroundColor; let worst = 99;
        for (const t of document.querySelectorAll('.t')) { const s = getComputedStyle(t);
          const a = light(s.color), b = light(/, 0\\)/.test(s.backgroundColor) ? paper : s.backgroundColor);
          worst = Math.min(worst, Math.max(a, b) / Math.min(a, b)); }
        return worst; }"""
    for _ in ("light", "dark"):
        for mode in ("excess", "loss", "ref", "entropy", "kept"):
            page.select_option("#mode", mode)
            assert page.evaluate(ratio) >= 4.5, mode
        page.click("#theme")
