"""The `slora` command: `demo | finetune | evaluate | merge | inspect | report | doctor`.

Each command parses its arguments, calls one function of the library and prints what it returns.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import slora.demo  # noqa: F401 (makes its model and data sets known by name)
from slora import __version__
from slora.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    NonFiniteLossError,
    SLoRAError,
    TargetError,
    WriteError,
)

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

NEEDS_TRAIN = (
    'this command needs the training extra; install it with: pip install "slora[train]". '
    "Without it there is slora doctor"
)
INTERRUPTED = 130
PATIENCE = 30.0
CHECKPOINT = (
    "A checkpoint of the run, finished or not: best (on the evaluation data), last, or the number of a step. "
    "[default: the run's result]"
)


def main() -> None:
    """Run the command line; an error of slora's is one red line on stderr and exit code 2."""
    if typer is None:
        if sys.argv[1:] == ["--version"]:
            print(f"slora {__version__}")
            sys.exit(0)
        if sys.argv[1:] == ["doctor"]:
            doctor()
            sys.exit(0)
        print(NEEDS_TRAIN, file=sys.stderr)
        sys.exit(2)
    try:
        app()(prog_name="slora")
    except (SLoRAError, OSError, ImportError) as error:
        if _tracebacks():
            raise
        if _is_everyones(error):
            # The first process on this machine says it and ends; what started both then ends this one. An end of this
            # one would keep the first from saying it.
            time.sleep(PATIENCE)
        _complain(_in_words(error))
        sys.exit(2)
    except RuntimeError as error:
        # torch.cuda.OutOfMemoryError, without importing torch where nothing else has.
        if type(error).__name__ != "OutOfMemoryError" or _tracebacks():
            raise
        _complain("the GPU is out of memory; lower --batch-size and raise --gradient-accumulation by the same factor")
        sys.exit(2)


def app() -> typer.Typer:
    """Build the command line."""
    result = typer.Typer(
        name="slora",
        help="Selective low-rank adaptation: fine-tune a pretrained model with few active LoRA blocks.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    result.callback()(_common)
    from slora.runs.flags import with_settings

    for command in (demo, with_settings(finetune), evaluate, merge, inspect, report, doctor):
        result.command(command.__name__)(command)
    return result


def _rank(of: str = "RANK") -> int:
    """The number of this process among those that torchrun or `accelerate launch` has started; 0 alone."""
    number = os.environ.get(of, "")
    return int(number) if number.isdigit() else 0


def _is_everyones(error: Exception) -> bool:
    """Whether another process on this machine, the first, is sure to meet the same error."""
    kinds = (ConfigError, TargetError, CheckpointError, NonFiniteLossError, ImportError)
    return _rank("LOCAL_RANK") > 0 and isinstance(error, kinds) and not isinstance(error, WriteError)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slora {__version__}")
        raise typer.Exit


def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error arose. Also: SLORA_TRACEBACK=1.")
    ] = False,
) -> None:
    if traceback:
        os.environ["SLORA_TRACEBACK"] = "1"
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and context.invoked_subcommand != "finetune":
        raise ConfigError(
            f"WORLD_SIZE={processes}: slora {context.invoked_subcommand} runs in one process, slora finetune alone in "
            f"several; start it without torchrun or accelerate launch"
        )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("slora-demo"),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each method, with different random seeds. [default: 3; full: 5]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter runs: to see that it works.")] = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the page in a browser at the end.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Four shifts instead of one, and scaled updates: about half an hour.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time, one thread each. [default: one per core, at most 4]")
    ] = None,
) -> None:
    """Adapt a small vision transformer to handwritten digits, on a CPU, offline, and write a page of results.

    Compares what a sceptic asks for: a linear probe, LoRA on all blocks with and without the head first, scaled, with
    distillation, on the last 4 blocks, on 4 at random, and selective adaptation with 4: what each learns, and what each
    forgets.

    \b
    Examples:
        slora demo --seeds 1 --out results
        slora demo --full
    """
    _needed("slora.demo.run", "demo").main(out, seeds, quick, open_report, full, jobs)


def finetune(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory. [default: runs/MODEL-DATA-METHOD]"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run directory, or one of its checkpoints, to go on with; flags override its settings."),
    ] = None,
    **settings: Any,
) -> None:
    """Fine-tune a pretrained model on a data set and write a run directory.

    Data sets: cifar10, cifar100, dtd, eurosat, flowers102, food101, gtsrb, imagenet, mnist, pets, stl10, svhn,
    digits and letters (both offline), and imagefolder:PATH with a subfolder per class, inside train/ and val/ or
    split 90/10. Ctrl-C finishes the step and writes a checkpoint.

    --blocks says how many LoRA blocks the result has: 4, or 0.1 for a tenth. All learn, the lowest ranked go one after
    another, and those that are left go on to learn. Without it gates and a penalty decide, as in the paper, and how
    many stay is not known before: the penalty alone takes about 0.05 * blocks / (gate-lr * penalty) steps to switch a
    block off. --retain-data holds what the model knew.

    \b
    Examples:
        slora finetune --model timm/vit_base_patch16_224 --pretrained --data cifar100 --blocks 0.1
        slora finetune --model demo/letters_vit --pretrained --data digits --blocks 4 --retain-data letters \\
            --batch-size 32 --max-steps 200 --lr 1e-2
        slora finetune --config run.yaml --lr 5e-4
        slora finetune --resume runs/vit_base_patch16_224-cifar100-selective
        torchrun --nproc_per_node 2 -m slora finetune --model timm/vit_base_patch16_224 --data cifar100 --blocks 0.1
    """
    from slora.runs.request import read_request

    given = {name: value for name, value in settings.items() if value is not None}
    # What is wrong with it is said before torch is imported, which takes seconds.
    read_request(given, config, out, resume)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # DDP would say that it found every parameter in use, as is so while all blocks are active.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from rich.console import Console

    from slora.runs.outcome import explained
    from slora.runs.rundir import command, read_settings
    from slora.training.process import leave
    from slora.training.run import finetune as run
    from slora.training.trainer import Interrupted

    try:
        folder, result = run(given, config, out, resume, Console(stderr=True))
    except Interrupted as stop:
        again = command(stop.checkpoint.parent.parent)
        print(f"stopped; the checkpoint {stop.checkpoint} is complete. Go on with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    leave()
    if _rank():
        return
    if result.accuracy is not None:
        print(f"accuracy {result.accuracy:.2%}, best {result.best_accuracy:.2%} at step {result.best_step}")
    if result.active_blocks:
        active = sum(map(len, result.active_blocks[-1][1].values()))
        print(f"active blocks: {active}; see them with: slora inspect {folder}")
        blocks = next((record["blocks"] for record in reversed(result.history) if "blocks" in record), 0)
        if text := explained(active, blocks, read_settings(folder).to_dict(), result.history):
            print(text)
    steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
    print(f"{steps} in {_seconds(result.seconds)}; results are in {folder}")
    try:
        print(f"report: {_needed('slora.report', 'report').write_report(folder, None)}")
    except SLoRAError as error:
        print(f"no report was written: {error}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory of slora finetune.")],
    source: Annotated[
        str | None,
        typer.Option(help="Data set that the model knew before, for k-NN. [default: none, accuracy only]"),
    ] = None,
    k: Annotated[str, typer.Option(help="Numbers of neighbours, separated by commas.")] = "10,20,100,200",
    data_root: Annotated[str | None, typer.Option(help="Folder of data sets. [default: the run's]")] = None,
    download: Annotated[
        bool | None,
        typer.Option("--download/--no-download", help="Download missing data sets. [default: as the run]"),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        typer.Option(help="Images per forward pass. [default: the run's]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu. [default: the run's]")] = None,
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Measure what a fine-tuned model can do, and what it still knows of a data set from before.

    Accuracy on the run's own data; with --source, weighted k-NN (temperature 0.07) on the features of that data
    set, with the model before and after fine-tuning. Writes evaluation.json into the run directory, or
    evaluation-step-STEP.json for a checkpoint.

    \b
    Examples:
        slora evaluate runs/letters_vit-digits-selective --source letters
        slora evaluate runs/letters_vit-digits-selective --checkpoint best
    """
    _check_early(run, checkpoint, source)
    from slora.training.evaluate_run import evaluate as measure

    try:
        neighbours = [int(number) for number in k.split(",")]
    except ValueError as error:
        raise ConfigError(f"k={k!r} is not a list of numbers; write 10,20,100,200") from error
    given = {
        "data_root": data_root,
        "download": download,
        "eval_batch_size": eval_batch_size,
        "device": device,
    }
    given = {name: value for name, value in given.items() if value is not None}
    result = measure(run, source, neighbours, checkpoint, **given)
    scores = result["accuracy"]
    whose = "" if result["checkpoint"] is None else f" of {result['checkpoint']}"
    print(f"accuracy{whose} on {scores['data']} ({scores['count']} images)")
    print(f"  top-1 {scores['top1']:.2%}   top-5 {scores['top5']:.2%}   mean over classes {scores['per_class']:.2%}")
    if result["knn"] is not None:
        knn = result["knn"]
        print(f"k-NN on {knn['source']} ({knn['queries']} images, {knn['bank']} vote)")
        print(f"  {'k':>4} {'before':>8} {'after':>8} {'points':>8}")
        for number, before in knn["before"].items():
            after = knn["after"][number]
            print(f"  {number:>4} {before:8.2%} {after:8.2%} {100 * (after - before):+8.2f}")
    if checkpoint is None:
        print(f"put it on the page of the run with: {shlex.join(['slora', 'report', str(run)])}")


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write; must not exist.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model the adapter belongs to, as in finetune. [default: the run's]"),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Merge into the model's pretrained weights; a run knows this itself.")
    ] = False,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000_000, help="Outputs of the classifier head. [default: those of the head in the adapter]"
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the update; between 0 and 1 it interpolates.")] = 1.0,
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Fold the active blocks of an adapter into its model and write plain weights.

    \b
    Examples:
        slora merge runs/letters_vit-digits-selective --out merged.safetensors
        slora merge runs/letters_vit-digits-selective --checkpoint best --out best.safetensors
        slora merge my-adapter --model timm/vit_base_patch16_224 --pretrained --out merged.safetensors
    """
    _check_early(adapter, checkpoint)
    from slora.training.merge_run import merge_adapter

    count = merge_adapter(adapter, out, model, pretrained, classes, scale, checkpoint)
    print(f"{count} block{'' if count == 1 else 's'} merged; {out} holds the plain model")
    if checkpoint is not None:
        _note_undecided(adapter, checkpoint)


def inspect(
    folder: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Show which blocks of an adapter live: '#' active, '.' inactive, with their gates.

    \b
    Examples:
        slora inspect runs/letters_vit-digits-selective
        slora inspect runs/letters_vit-digits-selective --checkpoint last
    """
    from slora.adapters.files import SELECTIVE, read_selective
    from slora.io.bounded import read_json
    from slora.runs.recorder import METRICS, read_metrics
    from slora.runs.rundir import CONFIG, RESULT, adapter_of, read_result, read_settings

    if checkpoint is not None:
        _check_early(folder, checkpoint)
        from slora.training.run import blocks_of

        name, content = blocks_of(folder, checkpoint)
        _show_blocks(content)
        print(f"checkpoint {name}")
        _note_undecided(folder, checkpoint)
        return
    home = adapter_of(folder)
    read_selective(home)  # Checks it; what is shown are the values as they stand there.
    content = read_json(home / SELECTIVE)
    active, blocks = _show_blocks(content)
    if (folder / RESULT).exists():
        result = read_result(folder)
        if result["accuracy"] is not None:
            print(f"accuracy {result['accuracy']:.2%} after {result['steps']} steps, {_seconds(result['seconds'])}")
    from slora.runs.outcome import explained

    asked = {"asked": content["asked"]} if content.get("asked") else {}
    settings = read_settings(folder).to_dict() if (folder / CONFIG).exists() else content["config"] | asked
    records = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    if text := explained(active, blocks, settings, records):
        print(text)


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of slora finetune.")],
    out: Annotated[Path | None, typer.Option(help="HTML file. [default: report.html in RUN]")] = None,
) -> None:
    """Write the HTML page of a run: curves, active blocks, and what slora evaluate found.

    \b
    Example:
        slora report runs/letters_vit-digits-selective
    """
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run} holds no metrics.jsonl; give the folder of a run made by slora finetune")
    print(_needed("slora.report", "report").write_report(run, out))


def doctor() -> None:
    """Show versions, the GPU, which parts of slora are there, and how to get what is missing.

    \b
    Example:
        slora doctor
    """
    from slora.cli.doctor import main as show

    show()


def _check_early(run: Path, which: str | None, source: str | None = None) -> None:
    """Check what can be checked without torch, whose import takes seconds."""
    from slora.runs.checkpoint_folders import chosen
    from slora.runs.rundir import read_settings
    from slora.sources.data_names import check_name

    if source is not None:
        check_name(source)
    if which is not None:
        read_settings(run)
        chosen(run, which)


def _note_undecided(run: Path, which: str) -> None:
    from slora.runs.checkpoint_folders import chosen, undecided

    if text := undecided(chosen(run, which)):
        print(f"note: {text}")


def _show_blocks(content: dict[str, Any]) -> tuple[int, int]:
    """Print the blocks of an adapter and return how many there are: (active, all)."""
    print(_table(content["layers"], content["base"]["shapes"]))
    print(f"threshold {content['config']['threshold']}; base model {content['base']['class']}")
    layers = content["layers"].values()
    return sum(len(entry["active"]) for entry in layers), sum(entry["blocks"] for entry in layers)


def _table(layers: dict[str, Any], shapes: dict[str, list[int]]) -> str:
    width = max([5, *map(len, layers)])
    lines = [f"{'layer':{width}}  {'in -> out':>14}  {'r':>3}  {'active':>8}  gates"]
    # JSON has them by the alphabet; the tenth block comes after the ninth.
    for name in sorted(
        layers, key=lambda name: [part.zfill(9) if part.isdigit() else part for part in name.split(".")]
    ):
        entry = layers[name]
        marks = "".join("#" if i in entry["active"] else "." for i in range(entry["blocks"]))
        shape = "{1} -> {0}".format(*shapes[name])
        gates = " ".join(f"{gate:.3f}" for gate in entry["gate"])
        lines.append(f"{name:{width}}  {shape:>14}  {entry['r']:>3}  {marks:>8}  {gates}")
    active = sum(len(entry["active"]) for entry in layers.values())
    blocks = sum(entry["blocks"] for entry in layers.values())
    lines.append(f"{active} of {blocks} blocks active ({active / max(1, blocks):.1%})")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"


def _needed(module: str, command: str) -> Any:
    """Import a part that other commands do without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'slora {command} cannot be imported ({error}); install it with: pip install "slora[train]"'
        ) from error


def _tracebacks() -> bool:
    return os.environ.get("SLORA_TRACEBACK", "").strip().lower() not in ("", "0", "false", "no")


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _complain(text: str) -> None:
    from rich.console import Console

    where = f" in process {_rank()}" if _rank() else ""
    Console(stderr=True, soft_wrap=True).print(f"error{where}: {text}", style="red", markup=False, highlight=False)
