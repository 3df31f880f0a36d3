"""Our token sets and stored losses, for any trainer: a torch Dataset of windows.

data = TokenSet("data/owm")
windows = Windows(data, 2048, Stored("out/owm/ref_loss.bin", data, 2048))
loader = torch.utils.data.DataLoader(windows, batch_size=8, shuffle=True)
"""

import numpy as np
import torch

IGNORED = -100  # the label of what is no target


class Windows(torch.utils.data.Dataset):
    """Window w as a dict of (T + 1,) tensors: input_ids, labels, and ref_loss where it is given.

    Labels are not shifted, as transformers wants them: position i is predicted from those before
    it, and the first is no target. So the targets and their context are those of our trainers.
    """

    def __init__(self, token_set, seq_len, ref_loss=None):
        """`ref_loss`: a data.Stored of the same token set and seq_len."""
        self.set = token_set
        self.seq_len = seq_len
        self.ref_loss = ref_loss

    def __len__(self):
        return self.set.n_windows(self.seq_len)

    def __getitem__(self, window):
        if not 0 <= window < len(self):
            raise IndexError(window)
        x, y, valid = self.set.batch([window], self.seq_len)
        ids = np.append(x[0, :1], y[0])
        labels = np.append(IGNORED, np.where(valid[0], y[0], IGNORED))
        row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.ref_loss is not None:
            values = self.ref_loss.batch([window], valid)[0]
            row["ref_loss"] = torch.from_numpy(np.append(np.float32(0), values))
        return row
