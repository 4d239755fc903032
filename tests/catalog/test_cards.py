"""Every card is valid, true to the code, and complete."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenry.catalog import card, cards, create
from tokenry.catalog.entries import CARDS, Card
from tokenry.catalog.making import ARGUMENTS, load
from tokenry.claims.registry import measurement_of
from tokenry.compare import KINDS

SLUGS = sorted(cards())
ROOT = Path(__file__).parents[2]
METHODS = {
    "affnet", "batchllm", "block-transformer", "byte-probabilities", "cas-vit", "cce", "data-mixture-inference",
    "davit", "dlgsanet", "efficientvim", "dualtoken-vit", "ems", "fs-gen", "gc-vit", "hrvmamba", "itransformer", "lastde", "metaformer-baselines",
    "mambamixer", "ms-mlp", "poolformer", "ppd", "s2d", "sg-former", "skipdecode", "stvit", "stvit-r", "superposed-decoding", "t2t-vit", "tidaldecode", "token-forcing",
    "token-recycling", "transnext", "uniformer", "uniformer-video",
}  # fmt: skip


def test_no_method_got_lost():
    assert set(SLUGS) >= METHODS


@pytest.mark.parametrize("slug", SLUGS)
def test_entry_points_exist(slug):
    found = card(slug)
    for entry in [found.entry_point, *found.also]:
        assert load(entry) is not None


@pytest.mark.parametrize("slug", SLUGS)
def test_claims_are_measured_or_say_why_not(slug):
    found = card(slug)
    for claim in found.claims:
        has = measurement_of(found, claim) is not None
        assert has == (claim.runs != "none"), f"{slug}/{claim.id}: runs={claim.runs!r}, measurement registered: {has}"


@pytest.mark.parametrize("slug", SLUGS)
def test_every_measurement_belongs_to_a_claim(slug):
    found = card(slug)
    measurement_of(found, found.claims[0])
    registry = importlib.import_module("tokenry.claims.registry")
    for owner, claim in registry._MEASURES:
        assert claim in {c.id for c in card(owner).claims}, f"{owner}/{claim} is measured but not on the card"


@pytest.mark.parametrize("slug", SLUGS)
def test_method_is_complete(slug):
    found = card(slug)
    snake = slug.replace("-", "_")
    assert set(found.compare) <= set(KINDS)
    assert list((ROOT / "tests").rglob(f"test_{snake}*.py")), "no test file"
    page = ROOT / "docs" / "methods" / f"{slug}.md"
    assert page.exists() and "```python" in page.read_text("utf-8"), "no docs page with an example"
    assert f"methods/{slug}.md" in (ROOT / "mkdocs.yml").read_text("utf-8"), "not in the navigation of the docs"
    assert f"docs/methods/{slug}.md" in (ROOT / "README.md").read_text("utf-8"), "not in the README's table"
    assert any(claim.kind == "behaviour" for claim in found.claims), "no behaviour experiment"


@pytest.mark.parametrize("slug", SLUGS)
def test_golden_cases_are_used(slug):
    folder = ROOT / "tests" / "golden" / slug
    if folder.exists():
        texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
        mine = "\n".join(text for text in texts if f'"{slug}"' in text)
        unused = [path.stem for path in folder.glob("*.json") if f'"{path.stem}' not in mine]
        assert not unused or f'golden_cases("{slug}")' in mine, f"golden cases without a test: {unused}"


@pytest.mark.parametrize("slug", SLUGS)
def test_snippet_runs(slug, tmp_path, monkeypatch):
    """In this process: one of its own per snippet would spend its time importing torch."""
    monkeypatch.chdir(tmp_path)
    exec(compile(card(slug).snippet, f"<snippet of {slug}>", "exec"), {"__name__": "__main__"})


def test_models_and_mixers_are_unique():
    names = [name for found in cards().values() for name in [*found.models, *found.mixers]]
    assert len(names) == len(set(names))


def test_create_works_cold():
    code = "import tokenry; print(type(tokenry.create('affnet_t', num_classes=3)).__name__, type(tokenry.create('pool', 8)).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(out) == 2


@pytest.mark.parametrize("size", ["xxs", "xs", "s", "b"])
def test_create_makes_what_a_card_names(size):
    model = create(f"uniformer_video_{size}", num_classes=3, device="meta")
    assert model.num_classes == 3


def test_one_name_means_one_thing():
    """``create`` looks a name up among all cards."""
    meant = {}
    for found in cards().values():
        for entry in (found.entry_point, *found.also):
            meant.setdefault(entry.split(":")[1], []).append(load(entry))
    assert all(every[0] is one for every in meant.values() for one in every)
    others = {*cards(), *(name for found in cards().values() for name in (*found.models, *found.mixers))}
    assert not others & set(meant) - set(cards())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tsm2", "tokenry.series.Forecaster('tsm2'"),
        ("block_main_b4_5", "tokenry.language.VARIANTS['block_main_b4_5'].config()"),
        ("lastde++", "tokenry.text.LastdeDetector(model, tokenizer, 'lastde++')"),
        ("likelihood", "tokenry.text.BaselineDetector(model, tokenizer, 'likelihood')"),
    ],
)
def test_names_that_are_arguments_are_refused_with_the_call(name, call):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is an argument: ") + ".*" + re.escape(call)):
        create(name)


def test_the_calls_of_arguments_run():
    import tokenry.language
    import tokenry.series
    import tokenry.text
    from tokenry.assets import load_model

    model, tokenizer = load_model("draft")
    for table, call in ARGUMENTS.items():
        for name in load(table):
            assert eval(call.format(name), {"tokenry": tokenry, "model": model, "tokenizer": tokenizer}) is not None


def test_tables_are_not_made():
    with pytest.raises(ValueError, match="called 'VARIANTS'"):
        create("VARIANTS")


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ValueError, match="did you mean.*poolformer"):
        card("poolfromer")
    with pytest.raises(ValueError, match="no method, model or mixer is called 'qqqq'; `tokenry list`"):
        create("qqqq")
    for wrong, right in [
        ("EMS", "ems"),
        ("token_recycling", "token-recycling"),
        ("afnet_t", "affnet_t"),
        ("super_tokn", "super_token"),
    ]:
        with pytest.raises(ValueError, match=f"did you mean {right}[,?]"):
            create(wrong)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('slug = "ems"', 'slug = "emz"', "file name and slug"),
        ("year = ", 'wrong = "x"\nyear = ', "Extra inputs"),
        ('runs = "none"', 'runs = "sometimes"', "runs"),
        ("year = ", "year = = ", "not a valid card"),
    ],
)
def test_bad_cards_are_refused(tmp_path, old, new, says):
    text = (CARDS / "ems.toml").read_text("utf-8")
    assert old in text
    (tmp_path / "ems.toml").write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ValueError, match=says):
        Card.read(tmp_path / "ems.toml")


def test_a_claim_that_cannot_run_says_why(tmp_path):
    text = re.sub(r"why_not = .*", 'why_not = ""', (CARDS / "ems.toml").read_text("utf-8"))
    (tmp_path / "ems.toml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match="say why in why_not"):
        Card.read(tmp_path / "ems.toml")


def test_other_packages_add_methods(monkeypatch):
    extra = card("ems").model_copy(update={"slug": "their-method"})

    class Entry:
        value = "their_package:card"

        def load(self):
            return extra

    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [Entry()] if group == "tokenry.methods" else []
    )
    cards.cache_clear()
    try:
        assert cards()["their-method"] is extra
    finally:
        cards.cache_clear()


def test_a_package_with_a_broken_card_is_named(monkeypatch):
    entry = importlib.metadata.EntryPoint("theirs", "no_such_package:CARD", "tokenry.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    cards.cache_clear()
    try:
        with pytest.raises(ValueError, match="theirs = no_such_package:CARD.*brings no card: ModuleNotFoundError"):
            cards()
    finally:
        cards.cache_clear()
