"""Measurements of Cut Cross-Entropy: memory and time of a large head, and whether training notices the difference."""

from __future__ import annotations

import statistics
from typing import Any

from tokenry.claims.registry import Context, Measurement, NotRunnable, measures

__all__ = ["few_probabilities", "gemma_costs", "head_memory", "same_curve"]

EPS = 2.0**-12  # the paper's filter in bfloat16


@measures("cce", "head-memory")
def head_memory(context: Context) -> Measurement:
    """Dense and cut, turn by turn, in one process."""
    import torch
    from torch.nn import functional as F

    from tokenry.measure import interleave, peak_extra_memory
    from tokenry.training import linear_cross_entropy

    n, v, d = 2048, 128_000, 256

    def measure() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(context.seed)
        e0 = torch.randn(n, d, generator=generator).to(context.device)
        c0 = (torch.randn(v, d, generator=generator) / d**0.5).to(context.device)
        y = torch.randint(0, v, (n,), generator=generator).to(context.device)

        def run(loss: Any) -> Any:
            def call() -> tuple:
                e, c = e0.detach().requires_grad_(), c0.detach().requires_grad_()
                value = loss(e, c)
                value.backward()
                return value.detach(), e.grad, c.grad

            return call

        calls = {
            "dense": run(lambda e, c: F.cross_entropy(e @ c.T, y)),
            "cut": run(lambda e, c: linear_cross_entropy(e, c, y, impl="chunked")),
            "two_passes": run(lambda e, c: linear_cross_entropy(e, c, y, impl="chunked", return_lse=True)[0]),
        }
        found = {name: call() for name, call in calls.items()}
        errors = {
            name: max(
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found[name], found["dense"], strict=True)
            )
            for name in ("cut", "two_passes")
        }
        found.clear()
        times = interleave(calls, repeats=3, warmup=0, device=context.device)
        memory = {name: peak_extra_memory(call, device=context.device) for name, call in calls.items()}
        return {
            "seconds": {name: timing.as_dict() for name, timing in times.items()},
            "memory_mib": {name: size / 2**20 for name, size in memory.items()},
            "gradient_error": errors,
        }

    found = context.session.step("measure", measure)
    less = found["memory_mib"]["dense"] / found["memory_mib"]["cut"]
    slower = found["seconds"]["cut"]["median"] / found["seconds"]["dense"]["median"]
    error = max(found["gradient_error"].values())
    return Measurement(
        shows=less >= 10 and slower <= 1.3 and error <= 1e-5,
        value=less,
        baseline=1.0,
        sentence=(
            f"{found['memory_mib']['cut']:.0f} MiB against {found['memory_mib']['dense']:.0f}: {less:.1f}x less (must be "
            f"10x), in {slower:.2f}x the time (must be at most 1.3x), gradients within {error:.1e} (must be 1e-5)"
        ),
        details=found,
    )


def _large_vocabulary() -> tuple[list[int], int]:
    """The embedded held-out text in the largest byte-pair vocabulary that it yields (some 13,000 entries)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from tokenry.assets import held_out_texts

    texts = [*held_out_texts("english"), *held_out_texts("code")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    return ids, tokenizer.get_vocab_size()


def _train(seed: int, device: str, steps: int, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Losses of a two-layer Llama whose head is padded to 32,768 rows; settings None is the model's own dense loss."""
    from contextlib import nullcontext

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenry.training import patch_model

    ids, vocab = _large_vocabulary()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32_768,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    tokens = torch.tensor(ids, device=device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with nullcontext() if settings is None else patch_model(model, **settings):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
            starts = torch.randint(0, len(ids) - 97, (4,), generator=generator).tolist()
            batch = torch.stack([tokens[s : s + 97] for s in starts])  # (4, 97)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses, "vocab": vocab, "tokens": len(ids)}


@measures("cce", "same-curve")
def same_curve(context: Context) -> Measurement:
    """Three trainings from one seed: dense; cut; cut with the filter of bfloat16."""
    steps = 60
    kinds = {
        "dense": None,
        "cut": {"impl": "chunked", "filter_eps": None},
        "filtered": {"impl": "chunked", "filter_eps": EPS},
    }
    found = {
        name: context.session.step(
            f"train/{name}", lambda settings=settings: _train(context.seed, context.device, steps, settings)
        )
        for name, settings in kinds.items()
    }
    dense = found["dense"]["losses"]
    apart = {
        name: max(abs(a - b) for a, b in zip(found[name]["losses"], dense, strict=True)) for name in ("cut", "filtered")
    }
    return Measurement(
        shows=apart["cut"] < 1e-4,
        value=apart["cut"],
        baseline=0.0,
        sentence=(
            f"over {steps} steps the loss falls from {dense[0]:.2f} to {statistics.mean(dense[-5:]):.2f}; the curves are "
            f"at most {apart['cut']:.1e} apart (must be below 1e-4); with tiles below 2^-12 skipped {apart['filtered']:.1e}"
        ),
        details={"apart": apart, **found["dense"], "losses": {name: run["losses"] for name, run in found.items()}},
    )


@measures("cce", "few-probabilities")
def few_probabilities(context: Context) -> Measurement:
    """Softmax of the embedded model on text it never saw."""

    def measure() -> dict[str, Any]:
        import torch

        from tokenry.assets import held_out_texts, load_model

        model, tokenizer = load_model("small", device=context.device)
        texts = [*held_out_texts("english")[:6], *held_out_texts("code")[:6]]
        counts, by_rank, tokens, vocab = 0, torch.zeros(model.config.vocab_size, device=context.device), 0, 1
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids.to(context.device)
            with torch.no_grad():
                p = model(ids).logits[0].float().softmax(-1)  # (T, V)
            counts += (p >= EPS).sum().item()
            by_rank += p.sort(-1, descending=True).values.sum(0)
            tokens, vocab = tokens + len(p), p.shape[1]
        mean = by_rank / tokens
        return {
            "entries_per_token": counts / tokens,
            "rank_below": int((mean >= EPS).sum()),
            "vocab": vocab,
            "tokens": tokens,
        }

    found = context.session.step("measure", measure)
    share = found["entries_per_token"] / found["vocab"]
    return Measurement(
        shows=share <= 0.1,
        value=found["entries_per_token"],
        sentence=(
            f"{found['entries_per_token']:.0f} of {found['vocab']} entries a token reach 2^-12, {share:.1%} (must be at "
            f"most 10 %); on average those beyond rank {found['rank_below']} do not"
        ),
        details=found,
    )


def gemma_costs(
    device: str, methods: list[str] | None = None, *, n: int = 8192, v: int = 256_000, d: int = 2304,
    softcap: float | None = 30.0, peaked: bool = True, repeats: int = 50, seed: int = 0,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Peak memory over the inputs (MiB) and median time (ms) of a large head's loss, on a CUDA device in bfloat16.

    Args:
        device: A CUDA device.
        methods: Of ``cut``, ``cut_unsorted``, ``cut_unfiltered``, ``cut_exact``, ``dense``, ``compiled``, ``liger``,
            ``authors``. None: all that are installed.
        n: Tokens.
        v: Vocabulary entries.
        d: Dimension.
        softcap: As Gemma 2; None for others.
        peaked: Add a Zipf-shaped common direction, so that few entries are probable, as in a trained model. False:
            random inputs, on which the filter skips nothing.
        repeats: Timed turns.
        seed: Seed of the inputs.

    Returns:
        Per method ``loss_mib``, ``both_mib``, ``loss_ms``, ``both_ms``, ``cosine`` (gradient of the hidden states
        against float32 on 512 tokens), or ``error`` for one that failed.
    """
    import torch
    from torch.nn import functional as F

    from tokenry.kernels import LinearNLL, Plan
    from tokenry.measure import interleave, peak_extra_memory
    from tokenry.training import PRESETS, linear_cross_entropy

    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise NotRunnable("needs a CUDA device of compute capability 8.0 or higher")
    generator = torch.Generator(device).manual_seed(seed)
    e0 = torch.randn(n, d, generator=generator, device=device)
    c0 = torch.randn(v, d, generator=generator, device=device) / d**0.5
    if peaked:  # logits of a common direction fall with the logarithm of the rank, as word frequencies do
        e0[:, 0] = 8.0
        ranks = torch.randperm(v, generator=generator, device=device) + 1
        c0[:, 0] = (8.0 - 1.5 * ranks.log()) / 8.0
        y = (1 / ranks.float()).multinomial(n, replacement=True, generator=generator)
    else:
        y = torch.randint(0, v, (n,), generator=generator, device=device)
    e0, c0 = e0.bfloat16(), c0.bfloat16()

    def dense(e: Any, c: Any) -> Any:
        logits = e @ c.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), y[: len(e)])

    def unsorted(e: Any, c: Any) -> Any:
        from tokenry.kernels._triton.linear_cross_entropy import TRITON

        plan = Plan(softcap=softcap, filter_eps=EPS, sort=False)
        return LinearNLL.apply(e, c, None, y[: len(e)], None, plan, TRITON)[0].mean()

    losses: dict[str, Any] = {
        "cut": lambda e, c: linear_cross_entropy(e, c, y[: len(e)], softcap=softcap, impl="triton"),
        "cut_unsorted": unsorted,
        "cut_unfiltered": lambda e, c: linear_cross_entropy(
            e, c, y[: len(e)], softcap=softcap, impl="triton", filter_eps=None
        ),
        "cut_exact": lambda e, c: linear_cross_entropy(
            e, c, y[: len(e)], softcap=softcap, impl="triton", **PRESETS["exact"]
        ),
        "dense": dense,
        "compiled": torch.compile(dense),
    }
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss(softcap=softcap)
        losses["liger"] = lambda e, c: liger(c, e, y[: len(e)])
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as authors  # type: ignore[import-not-found]

        losses["authors"] = lambda e, c: authors(e, c, y[: len(e)], softcap=softcap)
    except ImportError:
        pass

    few = slice(0, 512)
    exact_e = e0[few].float().requires_grad_()
    truth = torch.autograd.grad(dense(exact_e, c0.float()), exact_e)[0].flatten()
    found: dict[str, dict[str, float]] = {}
    for name in methods or list(losses):
        if name not in losses:
            found[name] = {"error": "not installed"}  # type: ignore[dict-item]
            continue

        def forward(name: str = name) -> Any:
            return losses[name](e0.detach().requires_grad_(), c0.detach().requires_grad_())

        def both(forward: Any = forward) -> None:
            forward().backward()

        try:
            small = e0[few].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(losses[name](small, c0), small)
            cosine = F.cosine_similarity(gradient.float().flatten(), truth, dim=0).item()
            both()
            times = interleave({"loss": forward, "both": both}, repeats=repeats, warmup=3, device=device)
            found[name] = {
                "loss_mib": peak_extra_memory(forward, device=device) / 2**20,
                "both_mib": peak_extra_memory(both, device=device) / 2**20,
                "loss_ms": times["loss"].median * 1e3,
                "both_ms": times["both"].median * 1e3,
                "cosine": cosine,
            }
        except (RuntimeError, ValueError) as error:  # out of memory, or a peer that does not run here
            found[name] = {"error": str(error).splitlines()[0]}  # type: ignore[dict-item]
        torch.cuda.empty_cache()
    return found


@measures("cce", "gemma-memory")
def gemma_memory(context: Context) -> Measurement:
    """Against the size of the gradients alone."""
    found = context.session.step("measure", lambda: gemma_costs(context.device, ["cut", "dense"], repeats=5))
    bound = (8192 + 256_000) * 2304 * 2 / 2**20
    cut = found["cut"]
    if "error" in cut:
        raise NotRunnable(f"the kernel did not run: {cut['error']}")
    return Measurement(
        shows=cut["both_mib"] <= 1.01 * bound and cut["loss_mib"] <= 2 and cut["cosine"] >= 0.999,
        value=cut["both_mib"],
        baseline=found["dense"].get("both_mib"),
        sentence=(
            f"loss {cut['loss_mib']:.1f} MB (must be at most 2), with gradients {cut['both_mib']:.0f} MB, {cut['both_mib'] / bound:.3f}x "
            f"their own size (must be at most 1.01x), cosine to float32 {cut['cosine']:.4f} (must be 0.999)"
        ),
        details=found,
    )


@measures("cce", "gemma-time")
def gemma_time(context: Context) -> Measurement:
    """Against torch.compile, on peaked inputs."""
    found = context.session.step("measure", lambda: gemma_costs(context.device, ["cut", "compiled", "dense"]))
    cut, compiled = found["cut"], found["compiled"]
    for name, costs in (("kernel", cut), ("compiled loss", compiled)):
        if "error" in costs:
            raise NotRunnable(f"the {name} did not run: {costs['error']}")
    return Measurement(
        shows=cut["both_ms"] <= compiled["both_ms"],
        value=cut["both_ms"],
        baseline=compiled["both_ms"],
        sentence=f"{cut['both_ms']:.1f} ms against {compiled['both_ms']:.1f} of torch.compile (must not be more)",
        details=found,
    )
