"""Cut Cross-Entropy as people call it: golden cases, identities, transformers models, two processes, bad input."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from golden_case import GoldenCase
from tokenry.training import PRESETS, LinearCrossEntropy, VocabParallel, linear_cross_entropy, patch_model, z_loss

pytestmark = pytest.mark.method("cce")


def problem(shape=(3, 7), v=40, d=8, bias=False, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(*shape, d, generator=g, dtype=dtype, requires_grad=True)
    c = torch.randn(v, d, generator=g, dtype=dtype, requires_grad=True)
    b = torch.randn(v, generator=g, dtype=dtype, requires_grad=True) if bias else None
    return e, c, torch.randint(0, v, shape, generator=g), b


@pytest.mark.golden
@pytest.mark.parametrize("impl", ["chunked", "dense"])
@pytest.mark.parametrize(
    "name", ["plain_mean", "softcap_bias_shift_ignore_mean", "softcap_shift2_none", "zloss_shift_mean"]
)
def test_golden(name, impl):
    case = GoldenCase("cce", name)
    spec, given_ = case.spec, case.inputs
    e, c = given_["e"].requires_grad_(), given_["c"].requires_grad_()
    bias = given_["bias"].requires_grad_() if "bias" in given_ else None
    keys = {key: spec[key] for key in ("softcap", "shift", "reduction", "ignore_index")}
    loss, lse = linear_cross_entropy(e, c, given_["y"], bias, return_lse=True, impl=impl, **keys)
    case.compare("loss", loss.reshape(case.outputs["loss"].shape), tolerance=1e-5)
    case.compare("lse", lse, tolerance=1e-5)
    total = (loss * given_["grad_loss"]).sum() if "grad_loss" in given_ else loss
    if spec["z_loss_weight"]:
        z = z_loss(lse, given_["y"], shift=spec["shift"])
        case.compare("z_loss", z.reshape(1), tolerance=1e-5)
        total = total + spec["z_loss_weight"] * z
    total.backward()
    case.compare("grad_e", e.grad, tolerance=1e-5)
    case.compare("grad_c", c.grad, tolerance=1e-5)
    if bias is not None:
        case.compare("grad_bias", bias.grad, tolerance=1e-5)


@given(
    batch=st.integers(1, 3), length=st.integers(1, 6), shift=st.integers(0, 3), ignored=st.floats(0, 1),
    reduction=st.sampled_from(["mean", "sum", "none"]), softcap=st.sampled_from([None, 3.0]), bias=st.booleans(),
)  # fmt: skip
def test_equals_slicing_by_hand(batch, length, shift, ignored, reduction, softcap, bias):
    shift = min(shift, length - 1)
    e, c, y, b = problem((batch, length), 30, 5, bias, torch.float64, seed=batch * 100 + length)
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < ignored] = -100
    logits = e[:, : length - shift] @ c.T + (0 if b is None else b)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rest = y[:, shift:]
    expected = F.cross_entropy(logits.flatten(0, 1), rest.flatten(), reduction=reduction)
    loss, lse = linear_cross_entropy(
        e, c, y, b, shift=shift, reduction=reduction, softcap=softcap, return_lse=True, impl="chunked"
    )
    torch.testing.assert_close(loss.flatten(), expected.flatten(), equal_nan=True)
    torch.testing.assert_close(lse, torch.where(rest == -100, 0.0, logits.logsumexp(-1)))
    leaves = [x for x in (e, c, b) if x is not None]
    if (rest != -100).any():
        for a, x in zip(
            torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_pass_equals_two(monkeypatch, reduction, bias):
    """Few tokens at a time with the whole vocabulary, gradients in the forward pass; twice from one graph."""
    from tokenry.kernels import linear_cross_entropy_one_pass as one
    from tokenry.training import cce

    monkeypatch.setattr(one, "BYTES", 4 * 40 * 8)
    monkeypatch.setattr(one, "FEWEST", 4)
    e, c, y, b = problem(bias=bias, dtype=torch.float64)
    y[0, 3:5] = -100
    leaves = [x for x in (e, c, b) if x is not None]
    settings = {"shift": 1, "reduction": reduction, "impl": "chunked"}
    loss = linear_cross_entropy(e, c, y, b, **settings)
    assert "OnePassLoss" in type(loss.grad_fn).__name__
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    monkeypatch.setattr(cce, "_one_pass", lambda *a: False)
    other = linear_cross_entropy(e, c, y, b, **settings)
    torch.testing.assert_close(loss, other)
    for a, x, z in zip(first, again, torch.autograd.grad(3 * other, leaves), strict=True):
        torch.testing.assert_close(a, z)
        torch.testing.assert_close(x, z)


def test_a_constant_on_all_logits_changes_nothing():
    e, c, y, b = problem(bias=True)
    first = linear_cross_entropy(e, c, y, b, impl="chunked")
    torch.testing.assert_close(linear_cross_entropy(e, c, y, b + 7.5, impl="chunked"), first)


def test_no_kept_token_gives_nan_as_in_pytorch():
    e, c, y, _ = problem()
    y.fill_(-100)
    assert linear_cross_entropy(e, c, y, impl="chunked").isnan()
    loss = linear_cross_entropy(e, c, y, impl="chunked", reduction="sum")
    assert loss == 0
    loss.backward()
    assert (e.grad == 0).all() and (c.grad == 0).all()


def test_a_shift_does_not_cross_sequences():
    e, c, y, _ = problem((2, 5))
    whole = linear_cross_entropy(e, c, y, shift=1, reduction="none", impl="chunked")
    each = torch.stack([linear_cross_entropy(e[i], c, y[i], shift=1, reduction="none", impl="chunked") for i in (0, 1)])
    torch.testing.assert_close(whole, each)


def test_auto_takes_the_definition_only_where_it_is_small(monkeypatch):
    from tokenry.training import cce

    e, c, y, _ = problem()
    called = []
    monkeypatch.setattr(cce, "dense_nll", lambda *a: called.append(1) or (torch.zeros(21), torch.zeros(21)))
    linear_cross_entropy(e, c, y)
    monkeypatch.setattr(cce, "SMALL", 10)
    linear_cross_entropy(e, c, y)
    assert called == [1]


def test_autocast_gives_gradients_in_the_inputs_own_dtype():
    e, c, y, b = problem(bias=True)
    truth = linear_cross_entropy(e, c, y, b, impl="dense")
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(e, c, y, b, impl="chunked")
    loss.backward()
    assert loss.dtype == e.grad.dtype == c.grad.dtype == b.grad.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=2e-2, atol=2e-2)


def test_without_gradients():
    e, c, y, _ = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(e, c, y, impl="chunked")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy((e @ c.T).flatten(0, 1), y.flatten()))


def test_module_and_presets():
    e, c, y, _ = problem()
    expected = linear_cross_entropy(e, c, y, shift=1)
    for preset in PRESETS.values():
        assert torch.equal(LinearCrossEntropy(shift=True, **preset)(e, c, y), expected)
    assert "shift=1" in repr(LinearCrossEntropy(shift=1))
    with pytest.raises(ValueError, match="no such setting: eps"):
        LinearCrossEntropy(eps=1)


# Two processes, each with half of the vocabulary -------------------------------------------------------------------


def _half_vocabulary(rank: int, port: int, results) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        e, c, y, b = problem((2, 9), v=41, bias=True)
        share = VocabParallel.from_vocab(41)
        rows = slice(share.start, share.stop)
        mine, my_bias = c.detach()[rows].requires_grad_(), b.detach()[rows].requires_grad_()
        loss, lse = linear_cross_entropy(
            e, mine, y, my_bias, shift=1, softcap=4.0, return_lse=True, impl="chunked", vocab_parallel=share
        )
        (loss + 0.1 * z_loss(lse, y, shift=1)).backward()
        results[rank] = [loss.item(), e.grad.numpy().copy(), mine.grad.numpy().copy(), my_bias.grad.numpy().copy()]
    finally:
        dist.destroy_process_group()


def test_two_half_vocabularies_equal_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        mp.spawn(_half_vocabulary, args=(port, results), nprocs=2)
        halves = [results[0], results[1]]
    e, c, y, b = problem((2, 9), v=41, bias=True)
    loss, lse = linear_cross_entropy(e, c, y, b, shift=1, softcap=4.0, return_lse=True, impl="chunked")
    (loss + 0.1 * z_loss(lse, y, shift=1)).backward()
    for half in halves:
        assert half[0] == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(torch.from_numpy(half[1]), e.grad)
    torch.testing.assert_close(torch.cat([torch.from_numpy(h[2]) for h in halves]), c.grad)
    torch.testing.assert_close(torch.cat([torch.from_numpy(h[3]) for h in halves]), b.grad)


# Inside transformers ------------------------------------------------------------------------------------------------


def tiny(kind: str):
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2, **tokens))
    elif kind == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **sizes, **heads, **tokens, head_dim=16, final_logit_softcapping=3.0, attn_implementation="eager"
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=kind == "tied"))
    if kind == "bias":
        model.lm_head = nn.Linear(32, 97)
    return model.eval()


def step(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "tied", "bias", "gpt2", "gemma2"])
@pytest.mark.parametrize("impl", ["chunked", "dense"])
def test_a_patched_model_equals_itself(kind, impl):
    model = tiny(kind)
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}):
        inputs = {"input_ids": ids, "labels": labels, **extra}
        usual, expected = step(model, **inputs)
        with patch_model(model, impl=impl) as patched:
            assert patched is model
            output, grads = step(model, **inputs)
            assert output.logits is None
            torch.testing.assert_close(model(ids).logits, usual.logits)  # without labels as ever
            assert len(model(**inputs, return_dict=False)) == len(usual.to_tuple()) - 1
        torch.testing.assert_close(output.loss, usual.loss)
        assert grads.keys() == expected.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-6)
    assert "forward" not in model.__dict__ and "forward" not in model.get_output_embeddings().__dict__
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, usual.logits)


def test_logits_to_keep_takes_the_labels_that_follow():
    model = tiny("llama")
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    with patch_model(model):
        last = model(ids, labels=ids, logits_to_keep=4).loss
        chosen = model(ids, labels=ids, logits_to_keep=torch.tensor([2, 5])).loss
    torch.testing.assert_close(last, F.cross_entropy(logits[:, -4:-1].flatten(0, 1), ids[:, -3:].flatten()))
    torch.testing.assert_close(chosen, F.cross_entropy(logits[:, [2, 5]].flatten(0, 1), ids[:, [3, 6]].flatten()))


def test_train_only_and_restore():
    model = tiny("llama")
    ids = torch.arange(3, 12)[None]
    patch = patch_model(model, train_only=True)
    assert model(ids, labels=ids).logits is not None
    assert model.train()(ids, labels=ids).logits is None
    with pytest.raises(ValueError, match="patched already"):
        patch_model(model)
    patch.restore()
    patch.restore()
    assert model(ids, labels=ids).logits is not None


def test_an_error_inside_restores_the_head():
    model = tiny("llama")
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(AttributeError), patch_model(model):
        model(ids, labels=ids, attention_mask=object())
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_the_trainer_still_sees_what_the_model_takes():
    import inspect

    model = tiny("llama")
    before = inspect.signature(model.forward)
    with patch_model(model):
        assert inspect.signature(model.forward) == before


def test_a_factor_on_the_logits_is_measured_and_others_refused():
    model = tiny("llama")
    ids = torch.arange(3, 12)[None]
    plain = model.forward

    def scaled(how):
        def forward(*args, **kwargs):
            output = plain(*args, **{**kwargs, "labels": None, "return_dict": True})
            output.logits = how(output.logits)
            return output

        return forward

    model.forward = scaled(lambda x: x / 4)
    logits = model(ids).logits
    with patch_model(model):
        loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], ids[0, 1:]))
    model.forward = scaled(lambda x: x.clamp(min=0))
    with pytest.raises(ValueError, match="does more with its logits"), patch_model(model):
        model(ids, labels=ids)


def test_patching_the_wrong_thing():
    with pytest.raises(ValueError, match=r"no nn\.Linear head"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="cannot set reduction on a model"):
        patch_model(tiny("llama"), reduction="sum")


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, "targets' shape plus one dimension"),
        ({"c": torch.zeros(40, 9)}, r"c must be \(vocabulary, 8\)"),
        ({"bias": torch.zeros(39)}, "one number per row of c"),
        ({"targets": torch.full((3, 7), 40)}, r"in \[0, 40\) or ignore_index=-100, got 40"),
        ({"targets": torch.full((3, 7), -1)}, "got -1"),
        ({"targets": torch.zeros(3, 7)}, "integer classes"),
        ({"e": torch.zeros(3, 7, 8, dtype=torch.long)}, "floating-point"),
        ({"e": torch.zeros(0, 7, 8), "targets": torch.zeros(0, 7, dtype=torch.long)}, "empty"),
        ({"e": torch.zeros(3, 7, 8, dtype=torch.bfloat16)}, "cast one of them"),
        ({"shift": 7}, r"shift must be in \[0, 7\)"),
        ({"shift": -1}, "shift must be"),
        ({"reduction": "average"}, "mean, sum, none"),
        ({"impl": "cce"}, "auto, triton, chunked, dense"),
        ({"softcap": 0.0}, "positive"),
        ({"filter_eps": "high"}, "a number, 'auto' or None"),
        ({"filter_eps": 2.0}, "bound on a probability"),
        ({"vocab_parallel": VocabParallel(0, 20)}, r"40 rows, but vocab_parallel holds \[0, 20\)"),
        ({"vocab_parallel": VocabParallel(0, 40), "impl": "dense"}, "knows no vocab_parallel"),
    ],
)
def test_rejects(change, message):
    arguments = {"e": torch.zeros(3, 7, 8), "c": torch.zeros(40, 8), "targets": torch.zeros(3, 7, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_rejects_a_dtensor_and_an_empty_share():
    class Sharded(torch.Tensor):
        device_mesh = None

    with pytest.raises(ValueError, match="c is a DTensor"):
        linear_cross_entropy(
            torch.zeros(2, 4), torch.zeros(5, 4).as_subclass(Sharded), torch.zeros(2, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="start < stop"):
        VocabParallel(3, 3)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    e, c, y, _ = problem()
    with pytest.raises(ValueError, match=r"not float64; .*Use impl='chunked'"):
        linear_cross_entropy(e.double(), c.double(), y, impl="triton")
    kernels = pytest.importorskip("tokenry.kernels._triton.linear_cross_entropy", exc_type=ImportError)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"needs CUDA >= 8\.0; .*Use impl='chunked'"):
        linear_cross_entropy(e, c, y, impl="triton")
