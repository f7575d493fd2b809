"""`python -m examples.minilm`: what each strategy finds of the new task and forgets of the old one, as a table."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from examples.minilm.encoder import load_pretrained, model_folder
from examples.minilm.retrieval import scores, tasks
from examples.minilm.training import minilm_run
from slora.errors import MissingDependencyError

BUDGET = 4
# Of 36 blocks, or of their 288 ranks as many as four blocks have.
BLOCKS, RANKS = {"budget": BUDGET}, {"budget": 8 * BUDGET}
STRATEGIES: dict[str, dict[str, Any]] = {
    "all": {"method": "lora"},
    "all, distilled": {"method": "lora"},
    "gates": {"strategy": "gates", "gate_lr": 0.1, "penalty": 1.0},
    "budget, norm": {"strategy": "budget", "ranking": "norm", **BLOCKS},
    "budget, solo": {"strategy": "budget", "ranking": "solo", **BLOCKS},
    "sensitivity": {"strategy": "sensitivity", **BLOCKS},
    "sora": {"strategy": "sora", **RANKS},
    "codyra": {"strategy": "codyra", **RANKS},
    "increlora": {"strategy": "increlora", **RANKS},
    "adalora": {"strategy": "adalora", **RANKS},
    "random": {"strategy": "random", **BLOCKS},
    "last": {"strategy": "last", **BLOCKS},
    "first": {"strategy": "first", **BLOCKS},
}
SCALE = 0.5
ROW = "{:28} {:>6} {:>8} {:>9} {:>6} {:>6} {:>11} {:>10} {:>7}"


def main() -> None:
    """Run the strategies that the command line names, by default all, with one seed."""
    parser = argparse.ArgumentParser(prog="python -m examples.minilm", description=__doc__)
    parser.add_argument("strategies", nargs="*", help=f"some of: {'; '.join(STRATEGIES)} (default: all of them)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of all runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything works")
    asked = parser.parse_args()
    unknown = [name for name in asked.strategies if name not in STRATEGIES]
    if unknown:
        parser.error(f"unknown strategy {unknown[0]!r}; choose from {'; '.join(STRATEGIES)}")
    # On batches this small threads mostly wait for each other.
    torch.set_num_threads(1)
    try:
        data = tasks()
        model = load_pretrained(model_folder())
    except MissingDependencyError as error:
        parser.exit(2, f"{error}\n")
    functions, words = scores(model, data["test"]), scores(model, data["words"])
    print(ROW.format("", "blocks", "recall@1", "recall@10", "MRR", "NLL", "words lost", "parameters", "seconds"))
    print(_row("before", "0", 100 * functions.recall_1, 100 * functions.recall_10, functions.mrr, functions.nll))
    print(f"(words before: recall@1 {words.recall_1:.1%}, recall@10 {words.recall_10:.1%}, MRR {words.mrr:.3f})")
    for name in asked.strategies or STRATEGIES:
        plain = name == "all"
        settings = {"lr": asked.lr, **STRATEGIES[name]}
        run = minilm_run(
            settings, asked.seed, quick=asked.quick, retain="distilled" in name, scales=(SCALE,) if plain else ()
        )
        print(_row(name, f"{run['active']}", *_found(run), f"{run['kept']:,}", f"{run['seconds']:.0f}"), flush=True)
        for scaled in run["scaled"]:
            print(_row(f"{name}, scaled by {SCALE}", f"{run['active']}", *_found(scaled)))


def _found(run: dict[str, Any]) -> tuple[float, float, float, float, float]:
    return run["target"], run["target_10"], run["mrr"], run["nll"], run["lost"]


def _row(
    name: str,
    blocks: str,
    recall_1: float,
    recall_10: float,
    mrr: float,
    nll: float,
    lost: float = 0.0,
    kept: str = "",
    seconds: str = "",
) -> str:
    numbers = f"{recall_1:.1f}", f"{recall_10:.1f}", f"{mrr:.3f}", f"{nll:.3f}", f"{lost:.1f}"
    return ROW.format(name, blocks, *numbers, kept, seconds)


if __name__ == "__main__":
    main()
