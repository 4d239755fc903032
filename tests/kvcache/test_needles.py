from __future__ import annotations

import pytest
import torch

from tokenry.assets import held_out_texts, load_model
from tokenry.kvcache import (
    RecentReading,
    SlidingWindowCache,
    SnapKVCache,
    cache_fidelity,
    passkey_tokens,
    plant_needles,
    read_sparsely,
    reading_fidelity,
)  # fmt: skip

pytestmark = pytest.mark.method("ems")
DEPTHS = [0.1, 0.5, 0.9]


def test_a_needle_stands_at_its_depth_and_is_asked_for_at_the_end():
    passages = torch.arange(1000, 1020).repeat(2, 1)
    tokens = plant_needles(passages, torch.arange(90, 99), [0.0, 0.5, 1.0], length=6, cue=3, seed=1)
    assert tokens.shape == (6, 20 + 6 - 3 + 1)
    for row, at in zip(tokens, [0, 6, 12] * 2, strict=True):
        needle = row[at : at + 6]
        assert ((needle >= 90) & (needle < 99)).all()
        assert torch.equal(row[-6:], needle)
        assert torch.equal(torch.cat([row[:at], row[at + 6 : -6]]), passages[0, :12])
    assert torch.equal(tokens, plant_needles(passages, torch.arange(90, 99), [0.0, 0.5, 1.0], length=6, cue=3, seed=1))
    assert len(tokens[:, -6:].unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [1.5]}, "from 0 to 1"),
        ({"depths": []}, "from 0 to 1"),
        ({"cue": 6}, "shorter than the needle's 6"),
        ({"length": 20, "cue": 3}, "room for a needle of 20"),
        ({"passages": torch.arange(20)}, "must be .P, N."),
    ],
)
def test_rejects(change, message):
    arguments = {"passages": torch.arange(20)[None], "depths": [0.5], "length": 6, "cue": 3} | change
    with pytest.raises(ValueError, match=message):
        plant_needles(candidates=torch.arange(9), **arguments)


def test_passkeys_are_letters_and_digits_where_the_vocabulary_has_them():
    tokenizer = load_model("retriever")[1]
    ids = passkey_tokens(tokenizer)
    assert len(ids) == 62 and all(tokenizer.decode([i]).isalnum() for i in ids.tolist())

    class Words:
        all_special_ids = (0,)

        def __len__(self):
            return 12

        def convert_ids_to_tokens(self, ids):
            return [f"word{i}" for i in ids]

    assert passkey_tokens(Words()).tolist() == list(range(1, 12))


def test_the_retriever_finds_what_the_cache_still_holds():
    model, tokenizer = load_model("retriever")
    stream = torch.tensor(tokenizer(" ".join(held_out_texts("english")[:12]), add_special_tokens=False)["input_ids"])
    tokens = plant_needles(stream[: 6 * 128].view(6, 128), passkey_tokens(tokenizer), DEPTHS)
    found = cache_fidelity(
        model, tokens, 128,
        {"window": lambda: SlidingWindowCache(model.config, 48), "pooled": lambda: SnapKVCache(model.config, 48, 16, pool=7)},
    )  # fmt: skip
    by_depth = {name: f.correct.view(6, 3).mean(0) for name, f in found.items()}
    assert by_depth["full"].min() > 0.8
    assert by_depth["window"][:2].max() < 0.2 and by_depth["window"][2] > 0.8  # only the last is inside the window
    assert by_depth["pooled"].min() > 0.8

    read = reading_fidelity(model, tokens, 128, {"window": lambda: read_sparsely(model, RecentReading(48))})
    torch.testing.assert_close(read["full"].correct, found["full"].correct)
    assert read["window"].correct.view(6, 3)[:, 0].mean() < 0.2
