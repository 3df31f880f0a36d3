"""A part of the documents held out for validation: `prepare.py --val-share`.

Which side a document is on depends on its text alone: a hash of it, read as a number from 0 to 1,
is below the share or is not. So equal documents are on one side, with any number of workers, in any
order of sources, and in every token set that is prepared with the same share.
"""

import hashlib
from dataclasses import dataclass

FOLDER = "val"  # in --out: where the part lies that is held out
HASH_BYTES = 8


@dataclass
class Side:
    """The documents that a token set takes: those that are held out, or the others."""

    share: float  # of the documents that is held out
    held_out: bool

    def takes(self, text):
        digest = hashlib.sha256(text.encode()).digest()[:HASH_BYTES]
        number = int.from_bytes(digest, "big") / 256**HASH_BYTES
        return (number < self.share) == self.held_out

    @property
    def name(self):
        """As the set's plan and messages have it."""
        return f"{'held out' if self.held_out else 'not held out'} at --val-share {self.share:g}"
