"""Claims of byte probabilities: prompts cut anywhere, two vocabularies averaged, and code filled in."""

from __future__ import annotations

import math
import random
import statistics
from typing import TYPE_CHECKING, Any

from tokenry.assets import held_out_texts, load_model
from tokenry.assets.english import english_documents, is_held_out
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import token_stream, train
from tokenry.measure import standard_error

if TYPE_CHECKING:
    from tokenry.tokenization import ByteLM, ByteVocabulary

NEXT = 5  # bytes whose loss counts
CUTS = 240  # anywhere; a third as many before blanks
CHUNK = 40  # cuts per resumable step
ENSEMBLE = {"steps": 260, "passages": 24, "bytes": 100}
FIM = {"vocabulary": 8000, "width": 512, "layers": 10, "steps": 4000, "rows": 32, "length": 512, "spans": 200}


# Prompts cut anywhere ------------------------------------------------------------------------------------------------------


def _tokens_with(words: ByteVocabulary, data: bytes) -> Any:
    """Ids of the tokens that begin with ``data``."""
    import numpy as np

    if len(data) > words.byte_at.shape[1]:
        return words.order[:0]
    same = (words.byte_at[:, : len(data)] == np.frombuffer(data, dtype=np.uint8)).all(1)
    return words.order[same & (words.length >= len(data))]


def continuation_logprob(lm: ByteLM, prompt: str, target: bytes, *, healed: bool) -> list[float]:
    """Log P of the first 1, 2, ... bytes of ``target`` when tokens are generated after a prompt's own encoding.

    All ways to cut the new bytes into tokens count, so this is the distribution of the text that ``generate`` writes.

    Args:
        lm: Model and tokenizer.
        prompt: The prompt.
        target: What comes next in truth.
        healed: Token healing: drop the prompt's last token, and let the first new token begin with its bytes.
    """
    import numpy as np

    from tokenry.tokenization.prefix_passes import PrefixPasses

    words = lm.vocabulary
    ids, must = words.encodings(words.covered(prompt))[0], b""
    if healed:
        ids, must = ids[:-1], words.token_bytes[ids[-1]]
    data = must + target
    paths: list[tuple[int, ...]] = [()]
    for path in paths:  # grows while it is read
        size = len(words.bytes_of(path))
        for end in range(max(size + 1, 0 if path else len(must)), len(data)):
            paths += [
                (*path, int(i)) for i in _tokens_with(words, data[size:end]) if len(words.token_bytes[i]) == end - size
            ]
    passes = PrefixPasses(lm.model, lm.start("").passes.context)
    after = passes.after([(*ids, *path) for path in paths])
    rows = {path: after[*ids, *path].numpy() for path in paths}
    joint: dict[tuple[int, ...], float] = {(): 0.0}
    for path in paths[1:]:
        joint[path] = joint[path[:-1]] + rows[path[:-1]][path[-1]]
    allowed = np.logaddexp.reduce(rows[()][_tokens_with(words, must)]) if must else 0.0
    found = []
    for end in range(len(must) + 1, len(data) + 1):
        terms = []
        for path in paths:
            size = len(words.bytes_of(path))
            if size < end:
                terms.append(joint[path] + np.logaddexp.reduce(rows[path][_tokens_with(words, data[size:end])]))
        found.append(float(np.logaddexp.reduce(terms) - allowed))
    return found


def _cuts() -> list[dict[str, Any]]:
    """Prompts of held-out English and code, cut anywhere or before a blank, with the bytes that follow."""
    rng, found = random.Random(0), []
    texts = {kind: [t for t in held_out_texts(kind) if len(t) > 700] for kind in ("english", "code")}
    _, tokenizer = load_model()
    for number in range(CUTS + CUTS // 3):
        kind = ("english", "code")[number % 2]
        text = rng.choice(texts[kind])
        begin = rng.randrange(len(text) - 600)
        text = (
            text[text.index("\n", begin) + 1 :][:500]
            if "\n" in text[begin : begin + 100]
            else text[begin : begin + 500]
        )
        places = range(150, len(text) - 40)
        if number >= CUTS:
            places = [i for i in places if text[i] == " " and not text[i - 1].isspace()]
        if len(places) == 0:
            continue
        cut = rng.choice(places)
        ends = [end for _, end in tokenizer(text[: cut + 40], return_offsets_mapping=True)["offset_mapping"]]
        found.append(
            {
                "prompt": text[:cut],
                "target": text[cut : cut + 2 * NEXT],
                "place": "blank" if number >= CUTS else "token end" if cut in ends else "mid-token",
            }
        )
    return found


@measures("byte-probabilities", "cut-prompts")
def cut_prompts(context: Context) -> Measurement:
    """Loss of the next five bytes: exact, token healing, plain tokens."""
    from tokenry.tokenization import ByteLM

    lm = ByteLM(*load_model(device=context.device))
    cuts = _cuts()

    def losses(cut: dict[str, Any]) -> dict[str, Any]:
        """Loss of five bytes; at a blank of the five bytes behind it, given the blank, and of the blank itself."""
        blank = cut["place"] == "blank"
        target = cut["target"].encode()[: NEXT + blank]
        exact = lm.byte_logprobs(target, cut["prompt"]).cumsum(0).tolist()
        each = {"exact": exact} | {
            name: continuation_logprob(lm, cut["prompt"], target, healed=name == "healing")
            for name in ("healing", "naive")
        }
        after = {name: -(found[-1] - (found[0] if blank else 0.0)) for name, found in each.items()}
        return {"place": cut["place"], "losses": after, "first": {name: -found[0] for name, found in each.items()}}

    found: list[dict[str, Any]] = []
    for begin in range(0, len(cuts), CHUNK):
        part = cuts[begin : begin + CHUNK]
        found += context.session.step(f"cuts{begin}", lambda part=part: [losses(cut) for cut in part])

    def mean(name: str, *places: str, key: str = "losses") -> float:
        return statistics.fmean(f[key][name] for f in found if f["place"] in places)

    middle = [f["losses"] for f in found if f["place"] == "mid-token"]
    gaps = [f["naive"] - f["exact"] for f in middle]
    gap, error = statistics.fmean(gaps), standard_error(gaps)
    healed = [f["healing"] - f["exact"] for f in middle]
    anywhere = {name: mean(name, "mid-token", "token end") for name in ("exact", "healing", "naive")}
    inside = {name: mean(name, "mid-token") for name in anywhere}
    blank = {name: mean(name, "blank") for name in anywhere}
    at_blank = blank["naive"] - blank["exact"]
    shows = (
        anywhere["exact"] < anywhere["healing"] < anywhere["naive"]
        and inside["exact"] < inside["healing"] < inside["naive"]
        and gap > max(0.5, 2 * error)
        and abs(at_blank) < 0.05
    )

    def said(losses: dict[str, float]) -> str:
        return f"exact {losses['exact']:.2f}, healing {losses['healing']:.2f}, plain tokens {losses['naive']:.2f}"

    return Measurement(
        shows=shows,
        value=round(inside["exact"], 3),
        baseline=round(inside["naive"], 3),
        spread=round(error, 3),
        sentence=f"loss of the next {NEXT} bytes in nats after {len(middle)} prompts cut inside a token: {said(inside)}; after all "
        f"{len(middle) + sum(f['place'] == 'token end' for f in found)} cut anywhere: {said(anywhere)} (each must rise in this "
        f"order, and inside tokens plain must lose more than 0.5 and two standard errors of {error:.2f} to exact); of the bytes "
        f"behind a blank: {said(blank)} (plain and exact must differ by less than 0.05)",
        details={
            "mid_token": inside,
            "anywhere": anywhere,
            "behind_a_blank": blank,
            "the_blank_itself": {name: mean(name, "blank", key="first") for name in anywhere},
            "healing_minus_exact": {
                "mean": statistics.fmean(healed),
                "standard_error": standard_error(healed),
            },
            "prompts": {
                place: sum(f["place"] == place for f in found) for place in ("mid-token", "token end", "blank")
            },
        },
    )


# Two vocabularies --------------------------------------------------------------------------------------------------------------


def _byte_bpe(texts: list[str], vocabulary: int, special: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on texts; its first special token ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0])


def _llama(vocabulary: int, width: int, layers: int, length: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@measures("byte-probabilities", "two-vocabularies")
def two_vocabularies(context: Context) -> Measurement:
    """Bits per byte of two equal models whose vocabularies come from different halves of a text, and of their mean."""
    return _ensemble(context, (2000, 2000))


@measures("byte-probabilities", "unequal-vocabularies")
def unequal_vocabularies(context: Context) -> Measurement:
    """The same with a member that has half the vocabulary, so that it reads less text in as many tokens."""
    return _ensemble(context, (1000, 2000))


def _ensemble(context: Context, vocabularies: tuple[int, int]) -> Measurement:
    import torch

    from tokenry.tokenization import ByteEnsemble, ByteLM

    documents = [d for d in english_documents(context.data("english-public-domain")) if not is_held_out(d)]
    random.Random(0).shuffle(documents)
    members = []
    for half, vocabulary in enumerate(vocabularies):
        texts = documents[half::2]
        tokenizer = _byte_bpe(texts, vocabulary, ["<|endoftext|>"])
        model = _llama(vocabulary, 128, 3, 512, context.seed + half).to(context.device)
        train(
            context,
            f"train{half}-{vocabulary}",
            model,
            token_stream(tokenizer, texts),
            steps=ENSEMBLE["steps"],
            seed=context.seed + half,
        )
        members.append(ByteLM(model, tokenizer))
    both = ByteEnsemble(members)
    rng = random.Random(context.seed)
    texts = [text for text in held_out_texts("english") if len(text) > 400]

    def passage() -> list[float]:
        text = rng.choice(texts)
        begin = rng.randrange(len(text) - 300)
        begin = text.index(" ", begin)
        prompt, data = text[begin : begin + 100], text[begin + 100 :].encode()[: ENSEMBLE["bytes"]]
        state, bits = both.start(prompt), torch.zeros(3, dtype=torch.float64)
        for byte, after in zip(data, both.walk(state, data), strict=True):
            each = [m.next_byte_logprobs(s)[byte] for m, s in zip(members, state, strict=True)]
            bits -= torch.stack([*each, both.next_byte_logprobs(state)[byte]]) / math.log(2)
            state = after
        return (bits / len(data)).tolist()

    rows = context.session.step(f"passages{vocabularies}", lambda: [passage() for _ in range(ENSEMBLE["passages"])])
    first, second, mean = (statistics.fmean(column) for column in zip(*rows, strict=True))
    best = min((first, 0), (second, 1))
    gains = [row[best[1]] - row[2] for row in rows]
    return Measurement(
        shows=mean < best[0],
        value=round(mean, 4),
        baseline=round(best[0], 4),
        spread=round(standard_error(gains), 4),
        sentence=f"bits per byte of held-out English, {len(rows)} passages of {ENSEMBLE['bytes']} bytes: mean of both {mean:.3f}, "
        f"first half's vocabulary of {vocabularies[0]} alone {first:.3f}, second half's of {vocabularies[1]} alone {second:.3f} "
        "(the mean must be below the better one)",
        details={"passages": rows, "settings": ENSEMBLE | {"vocabularies": vocabularies}},
    )


# Code filled in ----------------------------------------------------------------------------------------------------------------


def _python_sources() -> tuple[list[str], list[str]]:
    """Files of the running Python's library, and the twentieth of them that is kept out."""
    import sysconfig
    import zlib
    from pathlib import Path

    kept, out = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and path.stat().st_size > 2000:
            text = path.read_text("utf-8", errors="ignore")
            (out if zlib.crc32(path.name.encode()) % 20 == 0 else kept).append(text)
    return kept, out


@measures("byte-probabilities", "fill-in-code")
def fill_in_code(context: Context) -> Measurement:
    """Exact matches of short spans in held-out code, prompts cut anywhere: exact endings, token healing, plain tokens."""
    import torch
    from transformers import LogitsProcessor

    from tokenry.tokenization import ByteLM, BytePromptEnding

    end, after, before = (f"<|{name}|>" for name in ("endoftext", "suffix", "prefix"))
    kept, out = _python_sources()
    tokenizer = _byte_bpe(kept, FIM["vocabulary"], [end, after, before])
    rng = random.Random(context.seed)
    e, a, b = tokenizer.convert_tokens_to_ids([end, after, before])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # The suffix first, then the text up to it as one piece, so that no token knows the prompt's end.
    stream: list[int] = []
    for _ in range(4):
        for text in kept:
            for begin in range(0, len(text), 1200):
                part = text[begin : begin + 1200]
                cut = rng.randrange(len(part))
                stream += [a, *encode(part[cut : cut + 300]), b, *encode(part[:cut]), e]
    model = _llama(FIM["vocabulary"], FIM["width"], FIM["layers"], 1024, context.seed).to(context.device)

    def loss(net: Any, batch: Any) -> Any:
        with torch.autocast(context.device.split(":")[0], dtype=torch.bfloat16):
            return net(input_ids=batch, labels=batch, use_cache=False).loss

    sizes = {"steps": FIM["steps"], "rows": FIM["rows"], "length": FIM["length"]}
    train(context, "train", model, torch.tensor(stream), lr=2e-3, seed=context.seed, loss=loss, **sizes)
    lm = ByteLM(model, tokenizer)

    class Healing(LogitsProcessor):
        def __init__(self, width: int, must: bytes) -> None:
            self.width = width
            self.allowed = [i for i, word in lm.vocabulary.token_bytes.items() if word.startswith(must)]

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if input_ids.shape[1] > self.width:
                return scores
            kept = torch.full_like(scores, -math.inf)
            kept[:, self.allowed] = scores[:, self.allowed]
            return kept

    def span() -> dict[str, bool]:
        text = rng.choice(out)
        begin = rng.randrange(max(1, len(text) - 1400))
        text = text[begin : begin + 1400]
        cut = rng.randrange(500, 800)
        stop = text.find("\n", cut + 4)
        stop = len(text) - 300 if stop < 0 else stop
        prompt, truth, rest = text[:cut], text[cut:stop], text[stop : stop + 300]
        context_ids = [a, *encode(rest), b]
        ids = encode(prompt)
        ending = BytePromptEnding(lm, prompt, context_ids)
        ways: dict[str, tuple[list[int], list[Any]]] = {
            "exact": (ending.inputs["input_ids"][0].tolist(), [ending]),
            "healing": (
                [*context_ids, *ids[:-1]],
                [Healing(len(context_ids) + len(ids) - 1, lm.vocabulary.token_bytes[ids[-1]])],
            ),
            "naive": ([*context_ids, *ids], []),
        }
        same = {}
        for name, (given, processors) in ways.items():
            inputs = torch.tensor([given], device=context.device)
            written = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                logits_processor=processors,
                do_sample=False,
                max_new_tokens=len(encode(truth)) + 12,
                eos_token_id=e,
                pad_token_id=e,
            )[0, len(context_ids) :]
            text_of = tokenizer.decode(written, skip_special_tokens=True)
            same[name] = text_of[len(prompt) :].rstrip() == truth.rstrip()
        return same

    spans = context.session.step("spans", lambda: [span() for _ in range(FIM["spans"])])
    share = {name: statistics.fmean(s[name] for s in spans) for name in ("exact", "healing", "naive")}
    return Measurement(
        shows=share["exact"] > share["naive"] and share["exact"] >= share["healing"],
        value=round(100 * share["exact"], 1),
        baseline=round(100 * share["naive"], 1),
        spread=round(100 * math.sqrt(share["exact"] * (1 - share["exact"]) / len(spans)), 1),
        sentence=f"{len(spans)} spans to the end of a line filled in exactly: exact endings {100 * share['exact']:.1f} %, token healing "
        f"{100 * share['healing']:.1f} %, plain tokens {100 * share['naive']:.1f} % (exact must be above plain and not below healing)",
        details={"settings": FIM},
    )
