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


@pytest.mark.parametrize("way", composition.LOSSLESS)
def test_what_promises_the_models_text_keeps_it(cells, way):
    """Lossless ways write the text of their model or refuse: no third thing."""
    for section, rows in cells.items():
        for condition, found in rows[way].items():
            fine = found in (composition.SAME, composition.DRAWS) or found.startswith("refused: ")
            assert fine, (section, condition, found)
    assert cells[composition.ONE][way]["batch, left padding"] == composition.SAME


def test_what_is_refused_alone_is_refused_in_company(cells):
    for cache in composition.CACHES:
        (section,) = (name for name in cells if name.lower().startswith(cache.lower()))
        for way, row in cells[section].items():
            if cells[composition.ONE][way][cache].startswith("refused: "):
                assert all(found.startswith("refused: ") for found in row.values()), (way, section, row)


def test_nothing_is_left_on_the_model():
    """After all contexts a model generates as before."""
    inputs = composition.alone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model was not fine-tuned")
        for way in composition.WAYS.values():
            model = way.model()
            before = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            with way.around(model):
                way.call(model, inputs, max_new_tokens=4, do_sample=False, **way.make(model))
            assert (model.generate(**inputs, max_new_tokens=8, do_sample=False) == before).all()
