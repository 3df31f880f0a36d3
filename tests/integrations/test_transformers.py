"""The drop-in beside our own trainer, beside the Trainer's own loss, and beside brute force."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import score
import slm
from common.errors import UserError
from conftest import HANGS, ROOT, write_model, write_set
from data import Loader, Stored, TokenSet
from hf import checkpoint
from slm import Selection
from training.heads import HEADS
from training.selector import Choice

datasets = pytest.importorskip("datasets", reason="not installed")

from integrations.collator import laid_out  # noqa: E402
from integrations.transformers import (  # noqa: E402
    SelectiveMixin,
    add_reference_losses,
    next_token_losses,
    selective_loss,
    slm_loss,
)
from integrations.windows import Windows  # noqa: E402

T = 16
K = 0.6


class SelectiveTrainer(SelectiveMixin, Trainer):
    """As a user would write it."""


@pytest.fixture
def inputs(vocabulary, tmp_path):
    """A token set, two models of transformers, and stored losses, as score.py makes them."""
    mask = (np.arange(600) % 7 > 1).astype(np.uint8)
    write_set(tmp_path / "d", vocabulary, 600, loss_mask=mask)
    write_model(tmp_path / "m", vocabulary, seed=1)
    write_model(tmp_path / "r", vocabulary, seed=2)
    arguments = f"--model {tmp_path}/r --data {tmp_path}/d --out {tmp_path}/ref_loss.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["score.py", *arguments.split(), "--seq-len", str(T)])
        score.main()
    return tmp_path


def arguments(folder, batch, steps, accumulate=1, **more):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        dataloader_num_workers=0,
        **more,
    )


class InOrder:
    """A trainer that takes the rows as they come."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class OrderedTrainer(InOrder, SelectiveTrainer):
    pass


def gradients(trainer, accumulate):
    """{name: gradient} of the first step, before it is taken."""
    found = {}

    class Stop(Exception):
        pass

    def before_step(*_):
        for name, parameter in trainer.model.named_parameters():
            found[name] = parameter.grad.clone()
        raise Stop

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.args.max_grad_norm = 0
    with pytest.raises(Stop):
        trainer.train()
    return found


def test_the_losses_are_score_py_s(inputs):
    data = TokenSet(inputs / "d")
    stored = Stored(inputs / "ref_loss.bin", data, T)
    windows = Windows(data, T)
    rows = datasets.Dataset.from_list(
        [{"input_ids": windows[w]["input_ids"].tolist()} for w in range(len(windows))]
    )
    scored = add_reference_losses(rows, inputs / "r", entropy=True)
    assert {"ref_loss", "ref_entropy"} <= set(scored.column_names)
    for w in range(len(windows)):
        valid = data.valid([w], T)
        ours = stored.batch([w], valid)[0][valid[0]]
        theirs = np.array(scored[w]["ref_loss"][1:])[valid[0]]
        assert np.allclose(ours, theirs, atol=2e-3)  # stored in fp16
    for name in ("ref_loss", "ref_entropy"):
        assert scored.features[name].feature.dtype == "float32"
    again = add_reference_losses(rows, inputs / "r", entropy=True)
    assert again.cache_files == scored.cache_files
    for other in (rows.to_iterable_dataset(), datasets.DatasetDict(train=rows)):
        with pytest.raises(UserError, match=f"got a {type(other).__name__}, wanted a datasets.D"):
            add_reference_losses(other, inputs / "r")


@pytest.mark.parametrize("k", [K, 1.0])
def test_a_collator_of_one_s_own_sees_the_columns_that_were_kept_for_it(inputs, k):
    """With `remove_unused_columns=False`, which is the caller's; theirs stay as they are."""
    seen = set()

    def collate(rows):
        for row in rows:
            seen.update(row)
        return default_data_collator([{name: row[name] for name in PLAIN} for row in rows])

    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "source": i} for i in range(4)]
    rows = add_reference_losses(datasets.Dataset.from_list(rows), inputs / "r")
    for keeps in (True, False):
        given = arguments(inputs / "o", 2, 1, remove_unused_columns=not keeps)
        trainer = SelectiveTrainer(
            model=AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32),
            args=given,
            train_dataset=rows,
            data_collator=collate,
            selection=Selection(k),
        )
        trainer.train()
        assert given.remove_unused_columns is not keeps
        assert seen == ({*PLAIN, "source"} if keeps else set(PLAIN))
        seen.clear()


PLAIN = ("input_ids", "labels")


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("k", [K, 1.0])
def test_loss_and_gradient_are_train_slm_s_on_the_same_batch(inputs, accumulate, k):
    data = TokenSet(inputs / "d")
    windows = Windows(data, T, Stored(inputs / "ref_loss.bin", data, T))
    n = 8 // accumulate
    trainer = OrderedTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32),
        args=arguments(inputs / "o", n, 1, accumulate),
        train_dataset=windows,
        selection=Selection(k),
    )
    theirs = gradients(trainer, accumulate)

    model = slm.WithLoss(checkpoint.load(inputs / "m"), HEADS["kept"])
    selection = Selection(k)
    stored = windows.ref_loss
    micro_batches = [np.arange(i, i + n) for i in range(0, 8, n)]
    n_kept = sum(selection.count(data.valid(w, T)) for w in micro_batches)
    for micro_batch in micro_batches:
        x, y, valid = data.batch(micro_batch, T)
        known = slm.Tokens(ref_loss=torch.from_numpy(stored.batch(micro_batch, valid)))
        choice = Choice(selection, known, torch.from_numpy(valid), None)
        total, _, _ = model(torch.from_numpy(x), torch.from_numpy(y), choice.keep)
        (total / n_kept).backward()
    ours = {name: p.grad for name, p in model.lm.named_parameters()}
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        scale = gradient.abs().max()
        assert (gradient - theirs[name]).abs().max() <= 1e-6 * max(1, scale) + 1e-5 * scale, name


def test_k_1_is_the_trainer_s_own_loss(inputs):
    """Padded rows of different lengths, accumulated: where means of means would differ."""
    rows = ragged(5)
    model = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)

    class Plain(InOrder, Trainer):
        pass

    parts = []
    for kind, more in ((Plain, {}), (OrderedTrainer, {"selection": Selection(1.0)})):
        trainer = kind(
            model=copy.deepcopy(model),
            args=arguments(inputs / "o", 1, 1, 4),
            train_dataset=rows,
            data_collator=padded,
            **more,
        )
        parts.append(gradients(trainer, 4))
    for name, gradient in parts[0].items():
        assert torch.equal(gradient, parts[1][name]), name


def ragged(n, seed=0):
    random = np.random.RandomState(seed)
    rows = []
    for i in range(n):
        length = 6 + 5 * i
        ids = random.randint(0, 200, length)
        labels = np.where(np.arange(length) < 2, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "ref_loss": random.rand(length) * 3})
    return datasets.Dataset.from_list(
        [
            {k: list(map(float if k == "ref_loss" else int, v)) for k, v in row.items()}
            for row in rows
        ]
    )


def padded(rows, side="right"):
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        gap = width - len(row["input_ids"])
        columns = (row["input_ids"], row["labels"], [1] * len(row["input_ids"]))
        for name, values, fill in zip(batch, columns, (0, -100, 0)):
            filled = values + [fill] * gap if side == "right" else [fill] * gap + values
            batch[name].append(filled)
    return {name: torch.tensor(values) for name, values in batch.items()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_no_context_of_the_reference(inputs, side):
    whole = ragged(4).remove_columns(["labels", "ref_loss"])
    batch = padded([{**row, "labels": row["input_ids"]} for row in whole], side)
    del batch["labels"]
    rows = datasets.Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    for name in ("ref_loss", "ref_entropy"):
        wanted = add_reference_losses(whole, inputs / "r", entropy=True)[name]
        got = add_reference_losses(rows, inputs / "r", entropy=True)[name]
        for i, mask in enumerate(np.array(rows["attention_mask"]) > 0):
            values = np.array(got[i])
            assert np.allclose(values[mask][1:], wanted[i][1:], atol=1e-5)
            assert not values[~mask].any()


def by_hand(logits, labels, ref, k):
    """Rank the targets that count in a plain loop; the mean loss of the kept ones."""
    found = []
    for row in range(labels.shape[0]):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != -100:
                p = F.log_softmax(logits[row, at - 1].double(), -1)[labels[row, at]]
                found.append((-p.item(), -p.item() - ref[row, at].item()))
    n = int(np.floor(k * len(found) + 0.5))
    best = sorted(range(len(found)), key=lambda i: (-found[i][1], i))[:n]
    return sum(found[i][0] for i in best) / n


def that_pads(inputs, rows, side):
    """A trainer whose batch is all rows, padded on one side."""
    return SelectiveTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32),
        args=arguments(inputs / "o", len(rows), 1),
        train_dataset=rows,
        data_collator=lambda rows: padded(rows, side),
        selection=Selection(K),
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_prompts_are_never_ranked(inputs, side):
    rows = ragged(4)
    trainer = that_pads(inputs, rows, side)
    batch = trainer.data_collator([rows[i] for i in range(4)])
    labels, ref = batch["labels"], batch["ref_loss"]
    for row in range(4):  # values stand where their tokens do
        there = batch["attention_mask"][row].bool()
        assert torch.allclose(ref[row][there], torch.tensor(rows[row]["ref_loss"]))
    logits = torch.randn(*labels.shape, 300, generator=torch.Generator().manual_seed(0))
    loss = slm_loss(logits, labels, ref, K)
    assert abs(loss.item() - by_hand(logits, labels, ref, K)) < 1e-5
    # the usual mistake: every position is ranked, those that are no target too
    wrong, kept = selective_loss(logits, labels.clamp(min=0), Selection(K), ref_loss=ref)
    assert abs(wrong.item() - by_hand(logits, labels, ref, K)) > 1e-3


def test_a_batch_without_labels_is_refused_in_one_line(inputs):
    trainer = that_pads(inputs, add_reference_losses(ragged(2), inputs / "m"), "right")
    with pytest.raises(UserError, match="got a batch of input_ids; wanted labels in it: a column"):
        batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_s_loss_does_not_hang_on_its_padding(inputs, side):
    """Its first token has no context: behind padding it is no target either."""
    rows = [{**row, "labels": row["input_ids"]} for row in ragged(3)]
    rows = datasets.Dataset.from_list(rows).remove_columns("ref_loss")
    rows = add_reference_losses(rows, inputs / "m")  # its own reference: no token has an excess
    trainer = that_pads(inputs, rows, side)
    made = trainer.data_collator([rows[i] for i in range(3)])
    (batch,), n_kept = trainer.get_batch_samples(iter([made]), 1, torch.device("cpu"))
    n_targets = sum(len(row["input_ids"]) - 1 for row in rows)
    assert n_kept == slm.n_keep(n_targets, K)
    logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits
    losses, kept = selective_loss(logits, batch["labels"], Selection(K), ref_loss=batch["ref_loss"])
    own, valid = next_token_losses(logits, batch["labels"])
    assert valid.sum() == n_targets
    assert (own - batch["ref_loss"][:, 1:])[valid].abs().max() < 1e-5


def test_values_stand_where_their_tokens_do():
    """A row whose own mask hides its beginning is not padded on the left."""
    ids = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])
    tokens = [ids[0, :3], ids[1]]
    values = [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]]
    assert laid_out("ref_loss", values, tokens, ids).tolist() == [[0, 1, 2, 0, 0], values[1]]
    left = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    assert laid_out("ref_loss", values, tokens, left).tolist() == [[0, 0, 0, 1, 2], values[1]]
    flat = torch.cat([*tokens, torch.zeros(2, dtype=torch.long)])[None]
    assert laid_out("ref_loss", values, tokens, flat).tolist() == [[*values[0], *values[1], 0, 0]]
    with pytest.raises(UserError, match="not found padded or one behind the other"):
        laid_out("ref_loss", values, tokens, ids + 1)
    with pytest.raises(UserError, match="is not finite"):
        laid_out("ref_loss", [[0.0, 1.0, float("nan")], values[1]], tokens, ids)


def test_rows_of_one_length_are_scored_together(inputs):
    random = np.random.RandomState(0)
    lengths = (9, 12, 9, 9, 12, 7)
    rows = [{"input_ids": random.randint(0, 200, n).tolist()} for n in lengths]
    calls = []
    model = AutoModelForCausalLM.from_pretrained(inputs / "r", dtype=torch.float32)
    model.register_forward_pre_hook(
        lambda module, args, more: calls.append(tuple(more["input_ids"].shape)), with_kwargs=True
    )
    scored = add_reference_losses(datasets.Dataset.from_list(rows), model, entropy=True)
    assert calls == [(3, 9), (2, 12), (1, 7)]
    for row, got in zip(rows, scored):
        one = datasets.Dataset.from_list([row])
        alone = add_reference_losses(one, model, batch_size=1, entropy=True)[0]
        for name in ("ref_loss", "ref_entropy"):
            assert np.allclose(got[name], alone[name], atol=1e-5)


def test_ties_keep_the_number_that_was_counted():
    labels = torch.arange(1, 21).view(2, 10)
    logits = torch.zeros(2, 10, 30)
    _, kept = selective_loss(logits, labels, Selection(0.5), ref_loss=torch.zeros(2, 10))
    assert kept.sum() == slm.n_keep(18, 0.5) == 9 and kept.flatten()[:9].all()


def test_the_mean_is_over_the_batch_and_not_a_mean_of_means(inputs):
    """Four rows of different lengths: accumulated one by one as in one batch (sequence scope)."""
    rows = ragged(4)
    model = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)
    parts = []
    for batch, accumulate in ((4, 1), (1, 4)):
        trainer = OrderedTrainer(
            model=copy.deepcopy(model),
            args=arguments(inputs / "o", batch, 1, accumulate),
            train_dataset=rows,
            data_collator=padded,
            selection=Selection(K, scope="sequence"),
        )
        parts.append(gradients(trainer, accumulate))
    for name, gradient in parts[0].items():
        assert torch.allclose(gradient, parts[1][name], rtol=1e-3, atol=1e-6), name


def test_it_learns_and_what_it_saves_is_read_here(inputs):
    data = TokenSet(inputs / "d")
    windows = Windows(data, T, Stored(inputs / "ref_loss.bin", data, T))
    trainer = SelectiveTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32),
        args=arguments(inputs / "o", 8, 30),
        train_dataset=windows,
        eval_dataset=windows,
        selection=Selection(K),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert trainer.evaluate()["eval_loss"] < before - 0.05
    trainer.save_model(str(inputs / "saved"))
    x = torch.arange(20)[None]
    with torch.no_grad():
        theirs = trainer.model(x).logits
        assert (checkpoint.load(inputs / "saved").logits(x) - theirs).abs().max() < 1e-4


def test_windows_are_the_loader_s(inputs):
    data = TokenSet(inputs / "d")
    windows = Windows(data, T)
    taken = Loader(len(windows), 4, 0).windows(0)
    x, y, valid = data.batch(taken, T)
    for row, w in enumerate(taken):
        item = windows[int(w)]
        assert item["input_ids"][:-1].tolist() == x[row].tolist()
        assert item["labels"][1:].tolist() == np.where(valid[row], y[row], -100).tolist()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_what_does_not_fit_is_one_line(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)
    rows = ragged(3)
    with pytest.raises(UserError, match="scope micro or sequence"):
        SelectiveTrainer(model=model, selection=Selection(K, scope="batch"))
    with pytest.raises(UserError, match=r"no column ref_loss; make it with add_reference_losses"):
        SelectiveTrainer(
            model=model,
            args=arguments(inputs / "o", 1, 1),
            train_dataset=rows.remove_columns("ref_loss"),
            selection=Selection(K),
        )
    with pytest.raises(UserError, match="has no rows"):
        add_reference_losses(datasets.Dataset.from_dict({"input_ids": []}), inputs / "r")
    with pytest.raises(UserError, match="wanted input_ids"):
        add_reference_losses(datasets.Dataset.from_list([{"text": "x"}]), model)
    for row, message in (
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "got position_ids without seq_lengths"),
        ({"input_ids": []}, "a row has no tokens"),
        ({"input_ids": [1, 2, 99999]}, "the ids 1 to 99999, the reference knows 0 to"),
        ({"input_ids": [1, 2, 3, 4], "seq_lengths": [2, 1]}, "a row of 4 tokens has seq_lengths"),
    ):
        with pytest.raises(UserError, match=message):
            add_reference_losses(datasets.Dataset.from_list([row]), model)
    trainer = SelectiveTrainer(
        model=model,
        args=arguments(inputs / "o", 1, 1),
        train_dataset=rows,
        data_collator=padded,
        selection=Selection(K),
    )
    row = {**rows[0], "ref_loss": rows[0]["ref_loss"][:-1]}
    with pytest.raises(UserError, match="changed after add_reference_losses"):
        trainer.data_collator([row])
    trainer = SelectiveTrainer(
        model=model,
        args=arguments(inputs / "o", 1, 1),
        train_dataset=Windows(TokenSet(inputs / "d"), T),  # has no column_names
        selection=Selection(K),
    )
    with pytest.raises(UserError, match=r"no column ref_loss; make it with add_reference_losses"):
        trainer.train()


def test_one_loss_at_a_time(inputs):
    """What else the trainer was told to train on is not dropped without a word."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)

    def made(selection, more=(), **settings):
        return SelectiveTrainer(
            model=model,
            args=arguments(inputs / "o", 1, 1, **settings),
            train_dataset=ragged(3),
            data_collator=padded,
            selection=selection,
            **dict(more),
        )

    with pytest.raises(UserError, match="got label_smoothing_factor beside a selection"):
        made(Selection(K), label_smoothing_factor=0.1)
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}
    with pytest.raises(UserError, match="got compute_loss_func beside"):
        made(Selection(K), own)
    made(Selection(1.0), own, label_smoothing_factor=0.1)
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="got output_router_logits"):
        made(Selection(K))


def test_no_noise_is_drawn_where_none_is_ranked():
    logits, labels = torch.randn(2, 9, 20), torch.randint(0, 20, (2, 9))
    before = torch.get_rng_state()
    slm_loss(logits, labels, torch.rand(2, 9, generator=torch.Generator()), K)
    selective_loss(logits, labels, Selection(1.0))
    assert torch.equal(before, torch.get_rng_state())
    selective_loss(logits, labels, Selection(K, "random"))
    assert not torch.equal(before, torch.get_rng_state())


def test_weights_of_no_target_are_no_nan():
    loss, _ = selective_loss(
        torch.randn(1, 5, 20), torch.full((1, 5), -100), Selection(1.0, "mile")
    )
    assert loss == 0


def sft(inputs, rows, **more):
    trl = pytest.importorskip("trl", reason="not installed")

    class SelectiveSFTTrainer(SelectiveMixin, trl.SFTTrainer):
        pass

    config = trl.SFTConfig(
        output_dir=str(inputs / "o"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        max_length=None,
        gradient_checkpointing=False,
        **more.pop("config", {}),
    )
    from transformers import AutoTokenizer

    model = more.pop("model", None) or AutoModelForCausalLM.from_pretrained(
        inputs / "m", dtype=torch.float32
    )
    return SelectiveSFTTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(inputs / "m"),
        selection=more.pop("selection", Selection(K)),
        **more,
    )


def test_packed_texts_are_told_apart_or_refused(inputs):
    ids = [list(range(3, 12)), list(range(20, 30))]
    packed = {"input_ids": sum(ids, []), "labels": sum(ids, []), "seq_lengths": [9, 10]}
    rows = add_reference_losses(datasets.Dataset.from_list([packed] * 4), inputs / "m")
    alone = datasets.Dataset.from_list([{"input_ids": text} for text in ids])
    wanted = sum(add_reference_losses(alone, inputs / "m")["ref_loss"], [])
    borders = {0, 9}  # has no context, or one that the collator makes no target
    got = rows[0]["ref_loss"]
    assert np.allclose([got[i] for i in range(19) if i not in borders],
                       [wanted[i] for i in range(19) if i not in borders], atol=1e-5)  # fmt: skip
    trainer = sft(inputs, rows)
    with pytest.raises(UserError, match="wanted padding_free=True"):
        trainer.train()
    trainer = sft(inputs, rows, config={"padding_free": True})
    trainer.train()
    for name in ("excess", "loss"):
        selection = Selection(K, name, "sequence")
        trainer = sft(inputs, rows, config={"padding_free": True}, selection=selection)
        with pytest.raises(UserError, match="got scope sequence and several texts in one row"):
            trainer.train()
    with pytest.raises(UserError, match="got (loss_type dft|compute_loss_func)"):
        sft(inputs, rows, config={"padding_free": True, "loss_type": "dft"})
    for kind in ("torch", "numpy"):
        scored = add_reference_losses(
            rows.remove_columns("ref_loss").with_format(kind), inputs / "m"
        )
        assert np.allclose(scored[0]["ref_loss"], got, atol=1e-6)
        trainer = sft(inputs, scored, config={"padding_free": True})
        trainer.data_collator([{**scored[0]}])


def test_sft_with_masked_prompts(inputs):
    trainer = sft(inputs, ragged(6))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch["ref_loss"].shape == batch["labels"].shape
    trainer.train()
    assert len([line for line in trainer.state.log_history if "loss" in line]) == 3


def test_sft_without_padding(inputs):
    rows = ragged(6)
    trainer = sft(inputs, rows, config={"padding_free": True})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    both = rows[0]["ref_loss"] + rows[1]["ref_loss"]
    assert torch.allclose(batch["ref_loss"][0, : len(both)], torch.tensor(both))
    trainer.train()


def test_sft_with_lora_has_one_model(inputs):
    peft = pytest.importorskip("peft", reason="not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = sft(inputs, ragged(6), peft_config=config)
    trainer.train()
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)


@pytest.mark.parametrize("score, per_token", [("dft", "(-l).exp()"), ("deft", "(-l * c).exp()")])
def test_a_weight_over_the_valid_targets_is_exact_however_it_is_accumulated(
    inputs, score, per_token
):
    rows = ragged(4)
    model = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32)
    batch = padded(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits[:, :-1].double().log_softmax(-1)
    valid = batch["labels"][:, 1:] != -100
    l = -log_p.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    c = log_p.exp().square().sum(-1)
    weights = eval(per_token, {"l": l.detach(), "c": c.detach()})
    (weights * l)[valid].sum().div(valid.sum()).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for size, accumulate in ((4, 1), (1, 4)):
        trainer = OrderedTrainer(
            model=AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32),
            args=arguments(inputs / "o", size, 1, accumulate),
            train_dataset=rows,
            data_collator=padded,
            selection=Selection(K, score),
        )
        for name, gradient in gradients(trainer, accumulate).items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("score", ["mile", "profit", "ref_and", "clean", "longce"])
def test_what_the_drop_in_cannot_do_is_one_line(inputs, score):
    with pytest.raises(UserError, match=f"score '{score}'; wanted scope micro or sequence"):
        SelectiveTrainer(args=None, selection=Selection(K, score))


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from data import Stored, TokenSet
from integrations.transformers import SelectiveMixin
from integrations.windows import Windows
from slm import Selection

class SelectiveTrainer(SelectiveMixin, Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

data = TokenSet("d")
world = int(os.environ.get("WORLD_SIZE", 1))
arguments = TrainingArguments(
    output_dir="o", per_device_train_batch_size=2, gradient_accumulation_steps=4 // world,
    max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True,
    save_strategy="no", optim="sgd",
)
trainer = SelectiveTrainer(
    model=AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32), args=arguments,
    train_dataset=Windows(data, 16, Stored("ref_loss.bin", data, 16)), selection=Selection(0.6),
)
trainer.train()
if trainer.is_world_process_zero():
    trainer.save_model(sys.argv[2])
"""


# accelerate shards on GPUs alone, so a Trainer cannot show it on a CPU: a loop of one's own can.
SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from data import Stored, TokenSet
from integrations.transformers import slm_loss
from integrations.windows import Windows
from slm import n_keep

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
data = TokenSet("d")
windows = Windows(data, 16, Stored("ref_loss.bin", data, 16))
model = AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
assert all(hasattr(p, "to_local") for p in model.parameters())
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in range(4):
    batches = []
    for i in range(4):
        rows = [windows[8 * step + 2 * i + j] for j in range(2)]
        batches.append({k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]})
    valid = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    n_kept = sum(n_keep(n, 0.6) for n in valid)
    for batch in batches[rank::world]:
        logits = model(input_ids=batch["input_ids"]).logits
        loss = slm_loss(logits, batch["labels"], batch["ref_loss"], 0.6, n_kept)
        (loss * world).backward()
    optimizer.step()
    optimizer.zero_grad()
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    torch.save(state, sys.argv[2])
dist.destroy_process_group()
"""


def on_ranks(ranks, code, out, folder):
    (folder / "train.py").write_text(code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *torchrun, "train.py", str(ROOT), out],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr


def assert_same_training(one, two, start):
    for name, tensor in one.items():
        moved = (tensor - start[name]).abs().max()
        assert moved > 0 and (tensor - two[name]).abs().max() <= 1e-6 + 1e-4 * moved, name


@pytest.mark.slow
def test_two_ranks_end_where_one_does(inputs):
    """Micro-batches of two windows, on one rank in turn or on two at once: the same training."""
    for ranks in (1, 2):
        on_ranks(ranks, RANKS, f"o{ranks}", inputs)
    one, two = (checkpoint.load(inputs / f"o{ranks}").state_dict() for ranks in (1, 2))
    assert_same_training(one, two, checkpoint.load(inputs / "m").state_dict())


@pytest.mark.slow
def test_two_ranks_that_share_a_model_end_where_one_does(inputs):
    """FSDP2 around transformers' model, and slm_loss."""
    for ranks in (1, 2):
        on_ranks(ranks, SHARDED, f"s{ranks}.pt", inputs)
    one, two = (torch.load(inputs / f"s{ranks}.pt") for ranks in (1, 2))
    start = AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32).state_dict()
    assert_same_training(one, two, start)
