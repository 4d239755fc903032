"""The page that says what goes with what is what happens."""

from __future__ import annotations

import warnings

import pytest

import composition


@pytest.fixture(scope="module")
def committed():
    return composition.PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def cells():
    return composition.table()


def test_the_page_is_true(cells, committed):
    assert committed == composition.HEAD + composition.page(cells), "run: python tests/composition.py"


def test_what_promises_the_models_text_keeps_it(cells):
    """Lossless ways write the text of their model or refuse: no third thing."""
    for way in (
        "`TokenRecycling`",
        "`ParallelPromptDecoding`",
        "`SortedSpeculative`",
        '`collaborate(method="speculative")`',
    ):
        for condition, found in cells[way].items():
            assert found in (composition.SAME, composition.DRAWS) or found.startswith("refused: "), (
                way,
                condition,
                found,
            )
        assert cells[way]["batch, left padding"] == composition.SAME


def test_nothing_is_left_on_the_model():
    """After all contexts a model generates as before."""
    model, inputs = composition.tiny(), composition.alone()
    before = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model was not fine-tuned")
        for way in composition.WAYS.values():
            with way.around(model):
                model.generate(**inputs, max_new_tokens=4, do_sample=False, **way.make(model))
    assert (model.generate(**inputs, max_new_tokens=8, do_sample=False) == before).all()
