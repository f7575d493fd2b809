"""`slora inspect`: prints the blocks of an adapter as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slora.cli.checkpoint_option import CHECKPOINT, check_early, note_undecided
from slora.config import SelectiveLoRAConfig
from slora.runs.read_results import duration


def inspect(
    folder: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Show which blocks of an adapter are active ('#') or inactive ('.'), with their gates.

    \b
    Examples:
        slora inspect runs/letters_vit-digits-selective
        slora inspect runs/letters_vit-digits-selective --checkpoint last
    """
    from slora.adapters.selective_json import SELECTIVE, read_selective
    from slora.io.bounded import read_json
    from slora.runs.metrics import METRICS, read_metrics
    from slora.runs.read_results import adapter_of, read_result
    from slora.runs.rundir import CONFIG, RESULT, read_settings
    from slora.runs.strategies import described

    if checkpoint is not None:
        check_early(folder, checkpoint)
        from slora.training.run_model import blocks_of

        name, content = blocks_of(folder, checkpoint)
        used = read_settings(folder)
        _show_blocks(content, used.to_dict(), used.lora_config())
        print(f"checkpoint {name}")
        note_undecided(folder, checkpoint)
        return
    adapter = adapter_of(folder)
    # Checked by read_selective, but shown as the file has it.
    read_selective(adapter)
    content = read_json(adapter / SELECTIVE)
    asked = {"asked": content["asked"]} if content.get("asked") else {}
    run = read_settings(folder) if (folder / CONFIG).exists() else None
    settings = content["config"] | asked if run is None else run.to_dict()
    active, blocks = _show_blocks(content, settings, None if run is None else run.lora_config())
    if (folder / RESULT).exists():
        result = read_result(folder)
        if result["accuracy"] is not None:
            print(f"accuracy {result['accuracy']:.2%} after {result['steps']} steps, {duration(result['seconds'])}")
    from slora.runs.explain_blocks import explained

    if settings.get("method") == "selective":
        print(f"strategy {described(settings)}")
    records = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    if text := explained(active, blocks, settings, records):
        print(text)


def _show_blocks(
    content: dict[str, Any], settings: dict[str, Any], config: SelectiveLoRAConfig | None
) -> tuple[int, int]:
    """Print the content of `selective.json` and return its numbers of blocks: (active, all).

    Args:
        settings: of the run, or what is known of them.
        config: of the run, if it is known.
    """
    from slora.runs.strategies import chooses_ranks

    by_rank = chooses_ranks(settings)
    print(block_table(content["layers"], content["base"]["shapes"], by_rank))
    if by_rank:
        print(f"{ranks_of(content['layers'], config)} ranks active")
    print(f"threshold {content['config']['threshold']}; base model {content['base']['class']}")
    layers = content["layers"].values()
    return sum(len(entry["active"]) for entry in layers), sum(entry["blocks"] for entry in layers)


def ranks_of(layers: dict[str, Any], config: SelectiveLoRAConfig | None) -> str:
    """Return the ranks of the active blocks, with the `config` of the run of how many: "58 of 576"."""
    ranks = [(entry.get("ranks", [entry["r"]] * entry["blocks"]), entry["active"]) for entry in layers.values()]
    count = sum(own[i] for own, active in ranks for i in active)
    if config is None:
        return str(count)
    return f"{count} of {sum(config.rank_of(name) * entry['blocks'] for name, entry in layers.items())}"


def block_table(layers: dict[str, Any], shapes: dict[str, list[int]], by_rank: bool = False) -> str:
    """Return a line per layer: shape, rank (of each block where they differ), which blocks are active, gates.

    Args:
        layers: "layers" of `selective.json`.
        shapes: of the adapted weights, by layer.
        by_rank: whether ranks were chosen; then those of each block are shown in any case.
    """
    from slora.models.summary import ranks_text

    width = max([5, *map(len, layers)])
    texts = {
        name: ranks_text(entry["r"], entry["active"], entry.get("ranks", [entry["r"]] * entry["blocks"]), by_rank)
        for name, entry in layers.items()
    }
    wide = max([3, *map(len, texts.values())])
    lines = [f"{'layer':{width}}  {'in -> out':>14}  {'r':>{wide}}  {'active':>8}  gates"]
    # JSON sorts names as text; here numbers sort by value.
    for name in sorted(
        layers, key=lambda name: [part.zfill(9) if part.isdigit() else part for part in name.split(".")]
    ):
        entry = layers[name]
        marks = "".join("#" if i in entry["active"] else "." for i in range(entry["blocks"]))
        shape = "{1} -> {0}".format(*shapes[name])
        gates = " ".join(f"{gate:.3f}" for gate in entry["gate"])
        lines.append(f"{name:{width}}  {shape:>14}  {texts[name]:>{wide}}  {marks:>8}  {gates}")
    active = sum(len(entry["active"]) for entry in layers.values())
    blocks = sum(entry["blocks"] for entry in layers.values())
    lines.append(f"{active} of {blocks} blocks active ({active / max(1, blocks):.1%})")
    return "\n".join(lines)
