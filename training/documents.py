"""Which document of a token set each token belongs to."""

import numpy as np

from common.errors import UserError
from hf.tokenizer import Tokenizer

BLOCK = 1 << 22  # tokens searched at a time


class Documents:
    """One pass over all tokens, at the start. A document ends with the end-of-text token.

    `count`: how many there are. Raises UserError where the tokenizer has no such token.
    """

    def __init__(self, token_set):
        end = Tokenizer.load(token_set.folder).eos_id
        if end is None:
            raise UserError(
                f"document: the tokenizer of {token_set.folder} has no end-of-text token"
            )
        tokens = token_set.tokens
        self.n_tokens = len(tokens)
        found = []
        for start in range(0, len(tokens), BLOCK):
            found.append(np.flatnonzero(tokens[start : start + BLOCK] == end) + start)
        self.ends = np.concatenate(found)
        is_cut = len(self.ends) == 0 or self.ends[-1] < len(tokens) - 1  # the last one
        self.count = len(self.ends) + is_cut

    def of(self, windows, seq_len):
        """The numbers of the windows' targets' documents, (B, T) int64."""
        targets = np.asarray(windows)[:, None] * seq_len + 1 + np.arange(seq_len)
        return np.searchsorted(self.ends, targets)  # an end belongs to what it ends

    def spread(self, values):
        """A value of each document, (count,), as one of each token."""
        starts = np.append(0, self.ends + 1)[: self.count]
        return np.repeat(values, np.diff(starts, append=self.n_tokens))
