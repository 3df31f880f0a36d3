"""Batches with a value per token: the stored columns laid out beside another collator's tensors."""

import torch

import slm
from common.errors import UserError


class Collator:
    """Another collator's batches, with the stored columns laid out as its tokens are."""

    def __init__(self, collator, stored, columns):
        """`stored`: names of columns with a value per token; `columns`: what the other one sees,
        None: all columns but those that a reference gave."""
        self.collator = collator
        self.stored = stored
        self.columns = columns

    def __call__(self, rows):
        values = {name: [row[name] for row in rows if name in row] for name in self.stored}
        rows = [{key: row[key] for key in row if self.is_seen(key)} for row in rows]
        tokens = [torch.as_tensor(row["input_ids"]) for row in rows]
        parts = [row["seq_lengths"] for row in rows if row.get("seq_lengths") is not None]
        is_packed = any(len(lengths) > 1 for lengths in parts)
        batch = self.collator(rows)
        for name, columns in values.items():
            if columns:  # evaluation sets need none
                refuse_mixed_texts(batch, is_packed)
                batch[name] = laid_out(name, columns, tokens, batch["input_ids"])
        return batch

    def is_seen(self, name):
        return name not in slm.STORED if self.columns is None else name in self.columns


def refuse_mixed_texts(batch, is_packed):
    """Raises UserError where texts in one row are not told apart as they were when scored."""
    if is_packed and ("position_ids" not in batch or "attention_mask" in batch):
        raise UserError(
            "SelectiveMixin: got packed rows (seq_lengths) without position_ids, or with an "
            "attention_mask beside them, so that texts would see each other, which they did not "
            "when the reference scored them; wanted padding_free=True"
        )


def laid_out(name, columns, tokens, ids):
    """Values of each row, (rows, T) as `ids` are: where the row's `tokens` stand.

    The collator padded them left or right, or put all behind each other in one row.
    """
    out = torch.zeros(ids.shape)
    values = []
    for column, row in zip(columns, tokens):
        column = torch.as_tensor(column, dtype=out.dtype)
        if len(column) != len(row):
            raise UserError(
                f"column {name}: got {len(column)} values for {len(row)} tokens; the data was "
                f"changed after add_reference_losses: do that last"
            )
        if not column.isfinite().all():
            raise UserError(f"column {name}: a value is not finite; make the column again")
        values.append(column)
    if len(ids) == 1 and len(tokens) > 1:
        values, tokens = [torch.cat(values)], [torch.cat(tokens)]
    for i, (column, row) in enumerate(zip(values, tokens)):
        n = len(row)
        for place in (slice(0, n), slice(ids.shape[1] - n, None)):
            if n <= ids.shape[1] and torch.equal(ids[i, place].cpu(), row):
                out[i, place] = column
                break
        else:
            raise UserError(
                f"column {name}: the collator made {tuple(ids.shape)} of rows of "
                f"{[len(row) for row in tokens]} tokens, in which they are not found padded or one "
                f"behind the other; cut and pack before add_reference_losses"
            )
    return out
