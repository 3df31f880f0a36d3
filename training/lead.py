"""The reference's lead: the student's validation loss minus the reference's, in nats.

The excess loss is high where the student may still learn something from the reference's example.
On the whole there is as much of that as the reference is ahead.
"""

DOCS = "docs/results.md#the-references-lead"


class Lead:
    """What is known of the lead, and the two lines that are said about it.

    reference: the reference's validation loss in nats (score.py --val), or None: then there is no
    lead and nothing is said. last: the student's before this process went on with the run, or None.
    """

    def __init__(self, reference, last):
        self.reference = reference
        lead = self.over(last)
        self.passed = lead is not None and lead <= 0

    def over(self, val_loss):
        """Nats by which the reference is ahead; None where one of the two is not known."""
        if self.reference is None or val_loss is None:
            return None
        return val_loss - self.reference

    def news(self, step, val_loss):
        """The line to print after a validation; None where there is nothing new."""
        lead = self.over(val_loss)
        if lead is None:
            return None
        if step == 0:
            self.passed = lead <= 0
            return self._at_the_start(val_loss, lead)
        if self.passed or lead > 0:
            return None
        self.passed = True
        return (
            f"step {step}: the student's validation loss {val_loss:.4f} has passed the "
            f"reference's {self.reference:.4f}; selection now drops most of what the student knows "
            f"better, which may help or harm ({DOCS})"
        )

    def _at_the_start(self, val_loss, lead):
        losses = (
            f"the reference's validation loss is {self.reference:.4f}, the base's {val_loss:.4f}"
        )
        if lead > 0:
            return f"{losses}: a lead of {lead:.4f} nats"
        return f"note: {losses}: it has no lead, its choice may be worse than none ({DOCS})"
