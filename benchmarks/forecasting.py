"""Long forecasting runs by the published protocol, and iTransformer beside its authors' code.

    python benchmarks/forecasting.py table --data ETTh1 --model itransformer --horizons 96 192 336 720 --out runs
    python benchmarks/forecasting.py table --data ~/forecasting/weather.csv.gz --model time-tokens --set d_model=512
    python benchmarks/forecasting.py speed --reference ~/src/iTransformer --out speed.jsonl

`table` trains and tests one model per horizon; a killed run goes on after its last epoch when called again with the same
--out. `speed` gives both the same weights and times inference and a training step, taken turn by turn in one process; a
ratio above 1 means that ours is faster. --reference is a checkout of github.com/thuml/iTransformer.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from tokenry.assets import etth1
from tokenry.measure import interleave
from tokenry.series import Forecaster, ITransformerConfig, ITransformerForPrediction, order_columns, read_frame
from tokenry.series.itransformer import checkpoint_filter_fn

SHAPES = [  # name, series, width, layers, batch, flow attention
    ("etth1", 7, 256, 2, 32, False),
    ("wide321", 321, 512, 3, 8, False),
    ("etth1-flow", 7, 256, 2, 32, True),
    ("wide321-flow", 321, 512, 3, 8, True),
]


def value(text: str) -> object:
    """What ``--set name=text`` means: a number, True, False or None, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def table(options: argparse.Namespace) -> None:
    frame = etth1() if options.data == "ETTh1" else order_columns(read_frame(options.data))
    name = Path(options.data).name.split(".")[0]
    settings = {key: value(text) for key, text in (item.split("=", 1) for item in options.set)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "table.jsonl"
    for horizon in options.horizons:
        forecaster = Forecaster(
            options.model,
            context_length=options.context,
            prediction_length=horizon,
            split=name,
            seed=options.seed,
            device=options.device,
            **settings,
        )
        forecaster.fit(frame, folder=options.out)
        found = forecaster.evaluate(frame)
        line = {"data": name, "model": options.model, "context": options.context, "horizon": horizon}
        line |= {"seed": options.seed, **settings}
        line |= {"mse": found["mse"], "mae": found["mae"], "windows": found["windows"], "history": forecaster.history}
        print(json.dumps({k: v for k, v in line.items() if k != "history"}))
        written = path.read_text("utf-8").splitlines() if path.exists() else []
        if json.dumps(line) not in written:  # of a run that was killed between two horizons
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def pair(reference: Path, width: int, layers: int, flow: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The authors' model and ours with the same weights."""
    sys.path.insert(0, str(reference))
    for missing in ("reformer_pytorch", "einops"):  # imported by their layers, not used by these two models
        if missing not in sys.modules:
            stub = types.ModuleType(missing)
            stub.LSHSelfAttention = stub.rearrange = None
            sys.modules[missing] = stub
    if flow:
        from model.iFlowformer import Model
    else:
        from model.iTransformer import Model
    settings = SimpleNamespace(
        seq_len=96, pred_len=96, output_attention=False, use_norm=True, d_model=width, d_ff=width, n_heads=8,
        e_layers=layers, embed="timeF", freq="h", dropout=0.1, class_strategy="projection", factor=1, activation="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Model(settings)
    config = ITransformerConfig(d_model=width, num_hidden_layers=layers, attention="flow" if flow else "full")
    ours = ITransformerForPrediction(config)
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    return theirs, ours


def speed(options: argparse.Namespace) -> None:
    device = options.device
    for name, series, width, layers, batch, flow in SHAPES:
        theirs, ours = (model.to(device) for model in pair(options.reference, width, layers, flow))
        past, marks = torch.randn(batch, 96, series, device=device), torch.rand(batch, 96, 4, device=device) - 0.5
        future = torch.randn(batch, 96, series, device=device)
        calls = {  # their forward scales its input in place
            "theirs": (theirs, lambda model=theirs, x=past, m=marks: model(x.clone(), m, None, None)),
            "ours": (ours, lambda model=ours, x=past, m=marks: model(x, m).prediction_outputs),
        }
        adam = {key: torch.optim.Adam(model.parameters(), lr=1e-4) for key, (model, _) in calls.items()}

        def infer(key: str, calls=calls) -> torch.Tensor:
            model, call = calls[key]
            model.eval()
            with torch.no_grad():
                return call()

        def step(key: str, calls=calls, adam=adam, future=future) -> None:
            model, call = calls[key]
            model.train()
            adam[key].zero_grad(set_to_none=True)
            F.mse_loss(call(), future).backward()
            adam[key].step()

        difference = (infer("theirs") - infer("ours")).abs().max().item()
        for what, run in (("inference", infer), ("train-step", step)):
            both = {key: (lambda key=key, run=run: run(key)) for key in calls}
            timings = interleave(both, repeats=options.repeats, warmup=2, device=device, min_seconds=0.05)
            ratio = timings["theirs"].median / timings["ours"].median
            line = {
                "id": f"{what}-{name}",
                "ratio": round(ratio, 3),
                "max_abs_difference": difference,
                "device": device,
            }
            line |= {key: timing.as_dict() for key, timing in timings.items()}
            print(f"{line['id']}: {ratio:.2f}x (largest difference of the outputs {difference:.1e})")
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("table")
    one.add_argument("--data", default="ETTh1", help="ETTh1 (embedded) or a CSV named after its data set")
    one.add_argument("--model", default="itransformer")
    one.add_argument("--context", type=int, default=96)
    one.add_argument("--horizons", type=int, nargs="+", default=[96])
    one.add_argument("--seed", type=int, default=2023)
    one.add_argument("--set", nargs="*", default=[], help="settings of the model or recipe, for example d_model=128")
    one.add_argument("--out", type=Path, default=Path("forecasting-runs"))
    one.set_defaults(run=table)
    two = commands.add_parser("speed")
    two.add_argument("--reference", type=Path, required=True)
    two.add_argument("--repeats", type=int, default=7)
    two.add_argument("--out", type=Path)
    two.set_defaults(run=speed)
    for command in (one, two):
        command.add_argument("--device", default="cpu")
        command.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
