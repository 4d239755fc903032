"""Search finds methods in the words of the problem."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenry.catalog import search

QUESTIONS = [
    ("shrink the kv cache", "ems"),
    ("faster decoding without training", "token-recycling"),
    ("speculative generation same text", "token-recycling"),
    ("loss does not fit in memory large vocabulary", "cce"),
    ("what was this tokenizer trained on", "data-mixture-inference"),
    ("forecast many variables time series", "itransformer"),
    ("was this text written by a model", "lastde"),
    ("detect generated text", "lastde"),
    ("several drafts from one pass", "superposed-decoding"),
    ("skip layers", "skipdecode"),
    ("read only part of a long cache", "tidaldecode"),
    ("one draft model for several targets", "s2d"),
    ("small and large model together", "fs-gen"),
    ("many prompts with a shared prefix", "batchllm"),
    ("prompt ends in the middle of a word", "byte-probabilities"),
    ("hidden text fingerprint in a model", "token-forcing"),
    ("mix tokens in the frequency domain", "affnet"),
    ("replace attention by pooling", "poolformer"),
    ("caformer", "metaformer-baselines"),
    ("enlarge small photographs super-resolution", "dlgsanet"),
    ("image network for a phone exported to onnx", "cas-vit"),
    ("vision mamba without a scan kernel", "efficientvim"),
    ("shift channels instead of attention", "ms-mlp"),
    ("backbone that sees neighbours sharply and the image coarsely", "transnext"),
    ("fuse local windows with a global overview", "maformer"),
    ("global tokens that know their place", "dualtoken-vit"),
    ("affnet_t", "affnet"),
    ("attention between channels", "davit"),
    ("window attention with a global query", "gc-vit"),
    ("keypoints and pose at high resolution", "hrvmamba"),
    ("forecast series with a state space model instead of attention", "mambamixer"),
    ("combine convolution with self-attention", "uniformer"),
    ("recognise actions in video clips", "uniformer-video"),
    ("superpixels that attend to each other", "stvit"),
    ("semantic tokens instead of all patches", "stvit-r"),
    ("keep detail of significant tokens and merge the others", "sg-former"),
    ("overlapping patch embedding instead of plain patches", "t2t-vit"),
]


@pytest.mark.parametrize(("query", "slug"), QUESTIONS)
def test_finds(query, slug):
    assert search(query)[0].slug == slug


@pytest.mark.parametrize(
    ("query", "slug"),
    [("poolfromer", "poolformer"), ("forcasting", "itransformer"), ("tokeniser mixtre", "data-mixture-inference")],
)
def test_forgives_typing_errors(query, slug):
    assert slug in [hit.slug for hit in search(query)[:2]]


def test_scores_fall_and_limit_holds():
    hits = search("token", limit=3)
    assert len(hits) <= 3
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


@pytest.mark.parametrize("query", ["", "  ", "?!", "the"])
def test_refuses_empty_queries(query):
    with pytest.raises(ValueError, match="no word to look for"):
        search(query)


@given(st.text(min_size=1, max_size=60))
def test_never_crashes(query):
    try:
        hits = search(query)
    except ValueError:
        return
    assert len({h.slug for h in hits}) == len(hits)
