"""Selective Language Modeling in transformers' Trainer and in TRL's SFTTrainer.

    from integrations.transformers import SelectiveMixin, add_reference_losses
    from slm import Selection

    dataset = add_reference_losses(dataset, "my-reference")  # once; a column `ref_loss`

    class SelectiveTrainer(SelectiveMixin, Trainer):  # or SFTTrainer
        pass

    trainer = SelectiveTrainer(
        model=model, args=arguments, train_dataset=dataset, selection=Selection(k=0.6)
    )
    trainer.train()

The reference is run once and its losses are stored, so that no second model is in memory later.
Padding and prompts (labels of -100) are never ranked. How many tokens are kept is counted over all
micro-batches and ranks before any gradient, so that the loss is their exact mean.
"""

import copy
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

import methods  # noqa: F401  more scores, by name
import slm
from common.errors import UserError
from integrations.collator import Collator
from integrations.windows import IGNORED

VERSION = "3"  # of what add_reference_losses gives, for the data set's cache
ROWS = 1000  # of a data set that are scored between two files of its cache
ROUTER = "output_router_logits"
STORED = {"ref_loss", "ref_entropy"}  # columns that add_reference_losses can make


# --------------------------------------------------------------------------------------------------
# the loss


def next_token_losses(logits, labels):
    """The loss of each target: logits (B, T, V), labels (B, T) -> losses, valid (B, T - 1).

    As in transformers, position i predicts labels[:, i + 1]. Losses are fp32, in nats, and 0 where
    the label is -100.
    """
    targets = labels[:, 1:]
    scores = slm.at_least_fp32(logits[:, :-1])
    losses = F.cross_entropy(
        scores.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view_as(targets), targets != IGNORED


def selective_loss(logits, labels, selection, n_kept=None, **stored):
    """The mean loss of the kept tokens, and which they are, or their weights (B, T - 1).

    `stored`: what the score needs beside the student's prediction, each (B, T) and indexed by the
    target as `labels` are: ref_loss=..., ref_entropy=.... `n_kept`: what to divide by; by default
    what the score divides by here (`per` of slm.Score).
    """
    losses, valid = next_token_losses(logits, labels)
    known = {name: values[:, 1:].float() for name, values in stored.items()}
    tokens = slm.Tokens(loss=losses.detach(), **known)
    if "noise" in selection.needs:
        tokens.noise = torch.rand_like(losses.detach())
    if selection.wants:
        scores = slm.at_least_fp32(logits[:, :-1].detach()).flatten(0, 1)
        for name, values in slm.of_predictions(scores, selection.wants).items():
            setattr(tokens, name, values.view_as(losses))
    kept = selection.mask(tokens, valid)
    if n_kept is None:
        n_kept = divisor(selection, kept, valid)
    return torch.where(kept != 0, kept * losses, 0.0).sum() / n_kept, kept


def divisor(selection, kept, valid):
    """What the summed loss is divided by, a scalar tensor."""
    per = selection.method.per if selection.method else "kept"
    if per == "weights":
        return torch.where(kept.sum() > 0, kept.sum(), 1)
    return ((kept != 0) if per == "kept" else valid).sum().clamp(min=1)


def slm_loss(logits, labels, ref_loss, k, n_kept=None):
    """Rho-1's loss for any training loop: the k with the highest excess loss, their mean.

    logits (B, T, V); labels, ref_loss (B, T), both indexed by the target. With gradient
    accumulation or several ranks give `n_kept`, the number kept in the whole batch:
    sum(slm.n_keep(valid, k)) over micro-batches and ranks, where `valid` counts labels[:, 1:] that
    are not -100. (DDP averages gradients: multiply the loss by the number of ranks.)
    """
    return selective_loss(logits, labels, slm.Selection(k), n_kept, ref_loss=ref_loss)[0]


# --------------------------------------------------------------------------------------------------
# the reference's losses


def add_reference_losses(dataset, model, batch_size=8, device=None, entropy=False, dtype=None):
    """A datasets.Dataset with one more column, `ref_loss` (and `ref_entropy`): a list per row.

    `dataset` has `input_ids`, `seq_lengths` where several texts are packed into a row, and
    `attention_mask` where rows are padded already; do this AFTER packing, for the context must be
    the one that the student will have. `model`: a folder, a hub id, or a model of transformers;
    `dtype`: what the first two are loaded as, torch.float32 by default, which on a GPU is several
    times as slow as torch.bfloat16. Up to `batch_size` rows of one length go through it together.
    Every `ROWS` rows go into the data set's own cache, and the same call goes on after a kill.
    Values are float32, indexed by the target; the first is 0. Raises UserError for a data set
    without input_ids, and for losses that are not finite.
    """
    from datasets import Dataset, concatenate_datasets

    if not isinstance(dataset, Dataset):
        raise UserError(
            f"add_reference_losses: got a {type(dataset).__name__}, wanted a datasets.Dataset: one "
            f"split of it, or of a stream what Dataset.from_generator writes to the disk"
        )
    if "input_ids" not in dataset.column_names:
        raise UserError(
            f"add_reference_losses: the data set has {', '.join(dataset.column_names)}, wanted "
            f"input_ids; tokenise (and pack) it first"
        )
    if "position_ids" in dataset.column_names and "seq_lengths" not in dataset.column_names:
        raise UserError(
            "add_reference_losses: got position_ids without seq_lengths, wanted these for packed "
            "rows: the reference has to see the texts apart, as the student will"
        )
    if len(dataset) == 0:
        raise UserError("add_reference_losses: the data set has no rows")
    reference, identity = _reference(model, device, dtype)

    def score(rows):
        return _score(rows, reference, entropy)

    parts = []
    for start in range(0, len(dataset), ROWS):
        part = dataset.select(range(start, min(len(dataset), start + ROWS)))
        words = [part._fingerprint, identity, str(entropy), VERSION]
        fingerprint = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
        parts.append(
            part.map(
                score,
                batched=True,
                batch_size=batch_size,
                new_fingerprint=fingerprint,
                desc="reference losses",
            )
        )
    return concatenate_datasets(parts)


def _reference(model, device, dtype):
    """(the model in evaluation mode, what tells it from another)."""
    if isinstance(model, (str, bytes)) or hasattr(model, "__fspath__"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or torch.float32)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else next(model.parameters()).device
    model = model.to(device).eval()
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return model, digest.hexdigest()


def _score(rows, model, entropy):
    """Columns for some rows of a data set. Rows of one length go through the model together."""
    n = len(rows["input_ids"])
    parts = rows.get("seq_lengths", [None] * n)
    for ids, lengths in zip(rows["input_ids"], parts):
        _refuse_unusable(ids, lengths, model)
    groups = {}
    for i, ids in enumerate(rows["input_ids"]):
        alone = i if parts[i] is not None and len(parts[i]) > 1 else None
        groups.setdefault((len(ids), alone), []).append(i)
    out = {"ref_loss": [None] * n}
    if entropy:
        out["ref_entropy"] = [None] * n
    for (_, alone), places in groups.items():
        chosen = {name: [column[i] for i in places] for name, column in rows.items()}
        found = _score_together(chosen, model, entropy, None if alone is None else parts[alone])
        for name, values in zip(out, found):
            for i, row in zip(places, values):
                out[name][i] = np.append(np.float32(0), row.float().cpu().numpy())
    return out


def _refuse_unusable(ids, lengths, model):
    """Raises UserError for a row of no tokens, of unknown ones, and of texts of other lengths."""
    if len(ids) == 0:
        raise UserError("add_reference_losses: a row has no tokens; leave it out (filter)")
    known = model.get_input_embeddings().num_embeddings
    lowest, highest = np.asarray(ids).min(), np.asarray(ids).max()
    if lowest < 0 or highest >= known:
        raise UserError(
            f"add_reference_losses: a row has the ids {lowest} to {highest}, the reference knows "
            f"0 to {known - 1}; are they of its tokenizer?"
        )
    together = len(ids) if lengths is None else np.asarray(lengths).sum()
    if together != len(ids):
        raise UserError(
            f"add_reference_losses: a row of {len(ids)} tokens has seq_lengths of {together}"
        )


@torch.no_grad()
def _score_together(rows, model, entropy, lengths=None):
    """The losses (B, T - 1), and the entropies, of rows of one length.

    `lengths`: of the texts that are packed into a single row.
    """
    device = next(model.parameters()).device
    ids = stacked(rows["input_ids"], device)
    labels = ids
    more = {}
    if lengths is not None:
        more["position_ids"] = positions(lengths).to(device)[None]
    mask = stacked(rows.get("attention_mask", [[1]]), device)
    if not mask.all():  # rows that were padded before
        more["attention_mask"] = mask
        labels = targets(ids, mask)
    logits = slm.at_least_fp32(model(input_ids=ids, use_cache=False, **more).logits)
    losses, valid = next_token_losses(logits, labels)
    if not losses.isfinite().all():
        raise UserError("add_reference_losses: a loss is not finite; it cannot be a reference")
    if not entropy:
        return [losses]
    values = slm.of_predictions(logits[:, :-1], ("entropy",))["entropy"]
    return [losses, values.where(valid, 0.0)]


def stacked(rows, device):
    """Rows of one length, lists or arrays, as one tensor (B, T)."""
    return torch.stack([torch.as_tensor(row) for row in rows]).to(device)


def targets(labels, attention_mask):
    """Labels that are no padding, and that no padding predicts: the others are -100. (B, T)."""
    masked = labels.masked_fill(attention_mask == 0, IGNORED)
    masked[:, 1:][attention_mask[:, :-1] == 0] = IGNORED
    return masked


def positions(lengths):
    """Positions that restart with each of the packed texts, (T,)."""
    return torch.cat([torch.arange(n) for n in lengths])


# --------------------------------------------------------------------------------------------------
# the trainers


class SelectiveMixin:
    """Goes in front of Trainer or SFTTrainer and takes `selection`, a slm.Selection.

    The training data has the columns that the selection needs (add_reference_losses). With k = 1
    the Trainer's own loss is called. Evaluation is untouched: the mean over every target. Scopes:
    "micro" and "sequence". Scores whose divisor is known before any gradient: a top k, and weights
    over all valid targets. Padding is no target, and predicts none: behind padding on the left a
    row's first token is not ranked. Raises UserError for what it cannot do.
    """

    def __init__(self, *args, selection, **kwargs):
        others = set(selection.needs) - {"loss", "noise", *slm.PREDICTION, *STORED}
        told_late = selection.counted != "masks" and not self._is_over_valid(selection)
        if selection.scope in ("batch", "set") or told_late or others:
            raise UserError(
                f"SelectiveMixin: got scope {selection.scope!r}, score {selection.score!r}; wanted "
                f"scope micro or sequence, and a top k or a weight over valid targets by loss, "
                f"{', '.join([*slm.PREDICTION, *sorted(STORED)])} or noise; train_slm.py has the "
                f"others"
            )
        self.selection = selection
        # A Trainer would drop the columns without a word. They are kept, and sorted out below.
        # The arguments that were given stay as they are, for the trainer of a baseline perhaps.
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        drops = given is None or given.remove_unused_columns
        if given is not None:
            arguments = copy.copy(given)
            arguments.remove_unused_columns = False
            if len(args) > 1:
                args = (args[0], arguments, *args[2:])
            else:
                kwargs["args"] = arguments
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False
        if self.args.n_gpu > 1:
            raise UserError("SelectiveMixin: wants one process per GPU; start it with torchrun")
        self.needed = sorted(set(selection.needs) & STORED)
        if selection.method:
            self.loss_is_scaled_for_ga = True  # it is divided by what all micro-batches keep
            self._refuse_other_losses()
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None:
            self._refuse_missing(columns)
        seen = self._model_columns() if drops else None  # None: all but ours
        self.data_collator = Collator(self.data_collator, self.needed, seen)

    @staticmethod
    def _is_over_valid(selection):
        return selection.method is not None and selection.method.per == "valid"

    def _refuse_other_losses(self):
        """Raises UserError where the trainer was told to train on another loss as well."""
        config = getattr(self.model, "config", None)
        for what, is_set in (
            ("label_smoothing_factor", self.args.label_smoothing_factor),
            ("compute_loss_func", self.compute_loss_func),
            ("loss_type dft", getattr(self.args, "loss_type", None) == "dft"),
            ("output_router_logits, whose loss is added,", config and config.to_dict().get(ROUTER)),
        ):
            if is_set:
                raise UserError(
                    f"SelectiveMixin: got {what} beside a selection; wanted one loss: leave it "
                    f"out, or take k = 1, which is the trainer's own"
                )

    def _refuse_missing(self, columns):
        missing = [name for name in self.needed if name not in columns]
        if missing:
            raise UserError(
                f"SelectiveMixin: the training data has no column {missing[0]}; make it with "
                f"add_reference_losses(dataset, REFERENCE{_entropy_flag(missing)})"
            )

    def _model_columns(self):
        self._set_signature_columns_if_needed()
        return {*self._signature_columns, "input_ids", "labels", "attention_mask", "seq_lengths"}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and how many tokens they keep over all ranks."""
        batches, own = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.selection.method is None:
            return batches, own
        kept = 0
        for batch in batches:
            if "labels" not in batch:
                raise UserError(
                    f"SelectiveMixin: got a batch of {', '.join(batch)}; wanted labels in it: a "
                    f"column of that name ({IGNORED} is no target), or a collator that makes them"
                )
            self._refuse_texts_in_one_row(batch)
            if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
                batch["labels"] = targets(batch["labels"], batch["attention_mask"])
            valid = (batch["labels"][:, 1:] != IGNORED).cpu().numpy()
            whole = self._is_over_valid(self.selection)
            kept += int(valid.sum()) if whole else self.selection.count(valid)
        kept = torch.tensor(kept, device=device)
        return batches, self.accelerator.gather(kept).sum().clamp(min=1)

    def _refuse_texts_in_one_row(self, batch):
        """Raises UserError where texts would be ranked together that have a rank each."""
        if self.selection.scope != "sequence" or "position_ids" not in batch:
            return
        starts = batch["position_ids"] == 0
        if "attention_mask" in batch:
            starts &= batch["attention_mask"] == 1
        elif "labels" in batch:  # a run of padding at the end
            targets_left = (batch["labels"] != IGNORED).flip(1).cumsum(1).flip(1) > 0
            starts &= targets_left
        if (starts.sum(1) > 1).any():
            raise UserError(
                "SelectiveMixin: got scope sequence and several texts in one row; wanted scope "
                "micro, or rows of one text (padding_free=False)"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        stored = {name: inputs.pop(name) for name in self.needed if name in inputs}
        if not model.training or self.selection.method is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._refuse_missing(stored)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        n_kept = num_items_in_batch
        loss, _ = selective_loss(outputs.logits, labels, self.selection, n_kept, **stored)
        loss = loss * self.accelerator.num_processes  # DDP and FSDP average over the ranks
        return (loss, outputs) if return_outputs else loss


def _entropy_flag(missing):
    return ", entropy=True" if "ref_entropy" in missing else ""
