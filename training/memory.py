"""What a score remembers of each token: `Stored`'s sister, which training writes.

A float16 value for each token of the corpus, indexed by the target as stored losses are, at first
0. It lies whole in every rank's memory and in every training state: 2 bytes a token each. A step
costs one copy to the CPU and, with several ranks, one exchange of the batch's new values.
"""

import numpy as np
import torch

from common.errors import UserError


class Memory:
    def __init__(self, token_set, seq_len):
        self.set = token_set
        self.seq_len = seq_len
        self.values = torch.zeros(token_set.count, dtype=torch.float16)

    def batch(self, windows):
        """The windows' values, (B, T) fp32."""
        cut = self.set.cut(self.values.numpy(), windows, self.seq_len, fill=0)
        return cut.astype(np.float32)

    def put(self, windows, values):
        """Write values (B, T) of the windows' valid targets. Raises UserError: not finite."""
        valid = self.set.valid(windows, self.seq_len)
        new = values.float().cpu().numpy().astype(np.float16)
        if not np.isfinite(new[valid]).all():
            raise UserError(
                "a score's `remember` gave values that are not finite or above 65504, the most "
                "that float16 holds; look at it"
            )
        array = self.values.numpy()
        for window, row, counts in zip(windows, new, valid):
            start = int(window) * self.seq_len + 1
            piece = array[start : start + self.seq_len]
            np.copyto(piece, row[: len(piece)], where=counts[: len(piece)])
