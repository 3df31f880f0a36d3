"""tools.bench trainers: both rows of a pair do the same work but for the selection."""

from types import SimpleNamespace

import pytest
import torch

from tools.bench import trainers


@pytest.mark.slow
@pytest.mark.parametrize("row", trainers.OWN)
def test_a_pair_differs_by_the_selection_alone(row, tmp_path):
    """With k = 1 both train the same weights; with less they do not."""
    args = SimpleNamespace(batch_size=1, seq_len=16, vocab_size=64, k=1.0, threads=1)

    def trained(row):
        trainer = trainers.trainer_of(row, args, str(tmp_path))
        assert trainers.step_seconds(trainer, args) > 0
        assert len(trainer.ends) == 1 + trainers.STEPS
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    own = trained(trainers.OWN[row])
    torch.testing.assert_close(trained(row), own, rtol=1e-5, atol=1e-6)
    args.k = 0.5
    assert not torch.allclose(trained(row), own, rtol=1e-5, atol=1e-6)
