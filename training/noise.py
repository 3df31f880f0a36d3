"""The noise of `--score random`: a function of seed, step and window, and so the same on any rank.

One file, so that what a run drew can be drawn again by whoever shows it (tools.explore).
"""

import numpy as np


def noise(seed, step, windows, seq_len):
    """Uniform in [0, 1), (windows, seq_len) float32."""
    rows = [np.random.RandomState([seed, step, int(window)]) for window in windows]
    return np.stack([row.rand(seq_len) for row in rows]).astype(np.float32)
