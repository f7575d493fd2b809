"""`slora finetune`. Its flags are the fields of `slora.runs.settings.TrainSettings`; `slora.runs.flags` makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from slora.cli.errors import imported, rank
from slora.errors import SLoRAError
from slora.runs.read_results import duration

INTERRUPTED = 130


def finetune(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory. [default: runs/MODEL-DATA-METHOD]"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run directory, or one of its checkpoints, to resume; flags override its settings."),
    ] = None,
    **settings: Any,
) -> None:
    """Fine-tune a pretrained model on a data set and write a run directory.

    Data sets: cifar10, cifar100, dtd, eurosat, flowers102, food101, gtsrb, imagenet, mnist, pets, stl10, svhn,
    digits and letters (both offline), and imagefolder:PATH with a subfolder per class, inside train/ and val/ or
    split 90/10. Ctrl-C finishes the step and writes a checkpoint.

    --blocks sets how many LoRA blocks the result has: 4, or 0.1 for a tenth. All blocks train at first, then the lowest
    ranked are switched off one by one, and the remaining ones train on. Without it gates and a penalty decide, as in
    the paper, and their number is known only at the end: the penalty alone takes about 0.05 * blocks / (gate-lr *
    penalty) steps to switch a block off. --retain-data makes the model forget less.

    --strategy names what chooses the blocks. With --blocks: budget (the default, as above), sensitivity (chosen before
    training by squared gradients, so that the others never cost anything), random, first, last. Without: gates, all.
    sora, codyra, increlora and adalora choose single ranks of blocks, and --blocks is a number or share of the ranks.

    A CLIP of open_clip gets a new linear head, or with --head zero-shot none: its classes are prompts, and --tower says
    which of its towers is trained. The weights of a CLIP are named: --pretrained TAG, or a file. Prompts are those of
    open_clip unless --templates and --class-names give others.

    \b
    Examples:
        slora finetune --model timm/vit_base_patch16_224 --pretrained --data cifar100 --blocks 0.1
        slora finetune --model demo/letters_vit --pretrained --data digits --blocks 4 --retain-data letters \\
            --batch-size 32 --max-steps 200 --lr 1e-2
        slora finetune --model timm/vit_base_patch16_224 --pretrained --data cifar100 --blocks 0.1 \\
            --strategy sensitivity
        slora finetune --model open_clip/ViT-B-32 --pretrained openai --tower image --head zero-shot --data pets \\
            --blocks 0.0625 --lr 1e-4
        slora finetune --config run.yaml --lr 5e-4
        slora finetune --resume runs/vit_base_patch16_224-cifar100-selective
        torchrun --nproc_per_node 2 -m slora finetune --model timm/vit_base_patch16_224 --data cifar100 --blocks 0.1
    """
    from slora.runs.request import read_request

    overrides = {name: value for name, value in settings.items() if value is not None}
    # Before torch is imported, which takes seconds.
    read_request(overrides, config, out, resume)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # DDP would warn that it found no unused parameter, which is normal while all blocks are active.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from rich.console import Console

    from slora.adapters.selective_json import SELECTIVE
    from slora.cli.inspect import ranks_of
    from slora.io.bounded import read_json
    from slora.runs.explain_blocks import explained
    from slora.runs.next_command import command
    from slora.runs.read_results import adapter_of
    from slora.runs.rundir import read_settings, run_dir_of
    from slora.runs.strategies import chooses_ranks
    from slora.training.finetune_run import finetune as run
    from slora.training.process import leave
    from slora.training.result import Interrupted

    try:
        folder, result = run(overrides, config, out, resume, Console(stderr=True))
    except Interrupted as stop:
        again = command(run_dir_of(stop.checkpoint))
        print(f"stopped; the checkpoint {stop.checkpoint} is complete. Resume with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    leave()
    if rank():
        return
    if result.accuracy is not None:
        print(f"accuracy {result.accuracy:.2%}, best {result.best_accuracy:.2%} at step {result.best_step}")
    if result.active_blocks:
        active = sum(map(len, result.active_blocks[-1][1].values()))
        used = read_settings(folder)
        ranks = ""
        if chooses_ranks(used.to_dict()) and used.method == "selective":
            layers = read_json(adapter_of(folder) / SELECTIVE)["layers"]
            ranks = f"active ranks: {ranks_of(layers, used.lora_config())}; "
        print(f"{ranks}active blocks: {active}; list them with: slora inspect {folder}")
        blocks = next((record["blocks"] for record in reversed(result.history) if "blocks" in record), 0)
        if text := explained(active, blocks, used.to_dict(), result.history):
            print(text)
    steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
    print(f"{steps} in {duration(result.seconds)}; results are in {folder}")
    try:
        print(f"report: {imported('slora.report', 'report').write_report(folder, None)}")
    except SLoRAError as error:
        print(f"no report was written: {error}")
