"""--mix: each --source's part of --max-tokens."""

import numpy as np
import pytest
from prepared import (  # noqa: F401 (fixtures)
    documents,
    made_fixture,
    online_fixture,
    prepared,
    same_files,
    words_fixture,
)

from common.errors import UserError


@pytest.mark.parametrize(
    "weights, message",
    [("nan 1", "a weight above 0"), ("inf 1", "a weight above 0"), ("1 100", "less than a token")],
)
def test_a_mixture_that_cannot_be(online, words, tmp_path, weights, message):
    with pytest.raises(UserError, match=message):
        prepared(
            tmp_path / "out",
            "--source",
            "hf:cerebras/SlimPajama-627B",
            "hf:bigcode/starcoderdata",
            "--tokenizer",
            words,
            "--mix",
            *weights.split(),
            "--max-tokens",
            10,
        )


def test_a_mixtures_proportions_are_exact_for_any_number_of_workers(online, words, tmp_path):
    names = [
        "hf:cerebras/SlimPajama-627B",
        "hf:bigcode/starcoderdata",
        "hf:open-web-math/open-web-math",
    ]
    for workers in (1, 2):
        tokens = prepared(
            tmp_path / str(workers),
            "--source",
            *names,
            "--tokenizer",
            words,
            "--mix",
            6,
            3,
            1,
            "--max-tokens",
            10001,
            "--workers",
            workers,
        )
        counts = [entry["tokens"] for entry in tokens.meta["sources"]]
        assert (
            np.abs(np.array(counts) / 10001 - [0.6, 0.3, 0.1]).max() < 1e-4
            and sum(counts) == tokens.count == 10001
        )
        assert [entry["name"] for entry in tokens.meta["sources"]] == names
    assert same_files(tmp_path / "1", tmp_path / "2")
    part = prepared(
        tmp_path / "part", "--source", names[1], "--tokenizer", words, "--max-tokens", counts[1]
    )
    assert np.array_equal(tokens.tokens[counts[0] : counts[0] + counts[1]], part.tokens)
    with pytest.raises(UserError, match="starcoderdata ends .* tokens short of its share"):
        prepared(
            tmp_path / "short",
            "--source",
            *names[:2],
            "--tokenizer",
            words,
            "--mix",
            1,
            9,
            "--max-tokens",
            60000,
        )


@pytest.mark.parametrize(
    "flags", [["--mix", 1], ["--mix", 1, 0, "--max-tokens", 9], ["--mix", 1, 2]]
)
def test_mixtures_that_make_no_sense(words, tmp_path, flags):
    with pytest.raises(
        UserError, match="wanted a weight above 0 for each of 2 sources, and --max-tokens"
    ):
        prepared(tmp_path / "out", "--source", "a", "b", "--tokenizer", words, *flags)
