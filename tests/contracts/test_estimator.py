"""What every estimator and detector keeps: parameters, fit, repeat, refit, copies, pickles, and no surprises.

A new one is listed in ``ESTIMATORS``: its card, how it is made, what it is fitted on, and how its answer is read.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

from tokenry.assets import language_samples

MERGES = [("Ġ", "t"), ("h", "e"), ("e", "r"), ("e", "n"), ("Ġt", "he"), ("i", "n"), ("c", "h")]


@dataclass(frozen=True)
class Case:
    """One estimator.

    Attributes:
        card: Slug of its card.
        make: Makes it, unfitted.
        data: Arguments of ``fit``.
        answer: What it says, as numbers: from the fitted estimator.
        other: Other data, to fit it again.
        fitted: Attributes that ``fit`` sets.
    """

    card: str
    make: Callable[[], Any]
    data: Callable[[], tuple]
    answer: Callable[[Any], Any]
    other: Callable[[], tuple]
    fitted: tuple[str, ...]


@cache
def sentences(name: str) -> tuple[str, ...]:
    return tuple(language_samples()[name][:300])


def mixture_inference() -> Any:
    from tokenry.tokenization import MixtureInference

    return MixtureInference(MERGES)


def token_efficiency() -> Any:
    from tokenry.tokenization import TokenEfficiency

    return TokenEfficiency()


@cache
def tiny_scorer() -> tuple[Any, Any]:
    """A tiny random language model over the embedded tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenry.assets import load_model

    tokenizer = load_model("small")[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval(), tokenizer


def lastde_detector() -> Any:
    from tokenry.text import LastdeDetector

    return LastdeDetector(*tiny_scorer(), n_samples=4, max_tokens=50)


def passages(first: int) -> list[str]:
    from tokenry.assets import held_out_texts

    return [text[:400] for text in held_out_texts("english")[first : first + 4]]


ESTIMATORS: dict[str, Case] = {
    "mixture-inference": Case(
        card="data-mixture-inference",
        make=mixture_inference,
        data=lambda: ({"english": sentences("eng_Latn"), "german": sentences("deu_Latn")},),
        answer=lambda fitted: list(fitted.proportions_.values()),
        other=lambda: ({"english": sentences("eng_Latn"), "spanish": sentences("spa_Latn")},),
        fitted=("proportions_", "pair_proportions_", "objective_", "violations_", "pair_slack_", "n_constraints_"),
    ),
    "token-efficiency": Case(
        card="data-mixture-inference",
        make=token_efficiency,
        data=lambda: ([[1.0, 0.5], [0.7, 0.9]], [[0.8, 0.2], [0.4, 0.6]]),
        answer=lambda fitted: fitted.predict([0.9, 0.6]),
        other=lambda: ([[1.0, 0.4]], [[0.6, 0.4]]),
        fitted=("slope_",),
    ),
    "lastde": Case(
        card="lastde",
        make=lastde_detector,
        data=lambda: (passages(0), [0, 1, 0, 1]),
        answer=lambda fitted: fitted.decision_function(passages(8)),
        other=lambda: (passages(4), [1, 0, 1, 0]),
        fitted=("threshold_", "classes_"),
    ),
}
SETS = [pytest.param(case, id=name, marks=pytest.mark.method(case.card)) for name, case in ESTIMATORS.items()]
each = pytest.mark.parametrize("case", SETS)


def numbers(case: Case, estimator: Any) -> np.ndarray:
    return np.asarray(case.answer(estimator), dtype=float)


@each
def test_fit_returns_itself_and_sets_only_underscored(case):
    estimator = case.make()
    before = set(vars(estimator))
    assert estimator.fit(*case.data()) is estimator
    new = set(vars(estimator)) - before
    assert set(case.fitted) <= new
    assert all(name.endswith("_") for name in new), new


@each
def test_answer_is_finite(case):
    assert np.isfinite(numbers(case, case.make().fit(*case.data()))).all()


@each
def test_same_answer_twice(case):
    np.testing.assert_array_equal(
        numbers(case, case.make().fit(*case.data())), numbers(case, case.make().fit(*case.data()))
    )


@each
def test_refit_forgets(case):
    twice = case.make().fit(*case.other()).fit(*case.data())
    np.testing.assert_array_equal(numbers(case, twice), numbers(case, case.make().fit(*case.data())))


@each
def test_parameters_round_trip(case):
    estimator = case.make()
    parameters = estimator.get_params()
    assert set(parameters) == set(inspect.signature(type(estimator).__init__).parameters) - {"self"}
    again = type(estimator)(**parameters)
    assert again.get_params().keys() == parameters.keys()
    with pytest.raises(ValueError, match="Invalid parameter"):
        estimator.set_params(no_such_parameter=1)


@each
def test_making_does_no_work(case):
    estimator = case.make()
    assert not any(name.endswith("_") for name in vars(estimator))


@each
def test_clone_is_unfitted_and_equal(case):
    estimator = case.make().fit(*case.data())
    fresh = clone(estimator)
    assert not any(hasattr(fresh, name) for name in case.fitted)
    np.testing.assert_array_equal(numbers(case, fresh.fit(*case.data())), numbers(case, estimator))


@each
def test_pickle_and_copy_keep_the_answer(case):
    estimator = case.make().fit(*case.data())
    for other in (pickle.loads(pickle.dumps(estimator)), copy.deepcopy(estimator)):
        np.testing.assert_array_equal(numbers(case, other), numbers(case, estimator))


@each
def test_fit_leaves_its_input_alone(case):
    given = case.data()
    before = copy.deepcopy(given)
    case.make().fit(*given)
    assert given == before


@each
def test_unfitted_has_no_answer(case):
    with pytest.raises((AttributeError, ValueError)):
        case.answer(case.make())


@each
def test_nothing_to_fit_is_refused(case):
    with pytest.raises((ValueError, TypeError)):
        case.make().fit(*({} if isinstance(part, dict) else [] for part in case.data()))


@each
def test_prints_its_parameters(case):
    assert type(case.make()).__name__ in repr(case.make())
