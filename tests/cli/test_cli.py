"""The `slora` command: its help, its output, and how it reports what is wrong."""

from __future__ import annotations

import dataclasses
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slora.cli import app
from slora.training import TrainSettings
from tests.cli.conftest import QUICK, Outcome

pytestmark = pytest.mark.once

COMMANDS = tuple("demo finetune evaluate merge compress decompress inspect report reproduce doctor".split())


def test_the_commands_are_those_of_the_design(slora: Callable[..., Outcome]) -> None:
    outcome = slora("--help")
    assert outcome.code == 0
    listed = [line.split()[0] for line in outcome.out.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_suffices(slora: Callable[..., Outcome], command: str) -> None:
    import typer

    outcome = slora(command, "--help")
    assert outcome.code == 0
    assert "Example" in outcome.out
    assert f"slora {command}" in outcome.out.split("Example")[1]
    group: Any = typer.main.get_command(app.app())
    for parameter in group.commands[command].params:
        if parameter.name != "help":
            assert parameter.help, parameter.name
            assert parameter.help.split(" [")[0].rstrip(".)").count(". ") <= 1, parameter.help
        if parameter.param_type_name == "option" and not parameter.required and not parameter.is_flag:
            assert "[default: " in parameter.help or parameter.show_default or parameter.default is None


def test_finetune_has_a_flag_with_its_default_for_every_setting(slora: Callable[..., Outcome]) -> None:
    text = " ".join(slora("finetune", "--help").out.split("Options:")[1].split())
    for field in dataclasses.fields(TrainSettings):
        flag = {"budget": "--blocks, --budget", "blocks": "--blocks-per-layer"}.get(
            field.name, "--" + field.name.replace("_", "-")
        )
        assert f" {flag} " in text
        words = {"None": "unset", "True": "yes", "False": "no"}
        default = words.get(str(field.default), str(field.default))
        # Up to the next flag; sentences may hold hyphens, but no word starts with two.
        own = text.split(f" {flag} ", 1)[1].removeprefix(f"/ --no-{flag[2:]}").split(" --")[0]
        assert f"[default: {default}]" in own


def test_finetune_trains_and_says_where_the_results_are(slora: Callable[..., Outcome]) -> None:
    outcome = slora("finetune", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "accuracy" in outcome.out
    assert "active blocks: 36" in outcome.out
    assert "results are in runs/letters_vit-digits-selective" in outcome.out
    assert "report: runs/letters_vit-digits-selective/page" in outcome.out
    assert "step 4 of 4" in outcome.err


def test_flags_go_before_the_config_file(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 0.5\nr: 3\nmethod: linear\n")
    quick = " ".join(QUICK).replace("--r 2 ", "").split()
    outcome = slora("finetune", *quick, "--config", "run.yaml", "--lr", "1e-3", "--out", "here")
    assert outcome.code == 0, outcome.err
    config = (tmp_path / "here/config.yaml").read_text()
    for line in ("lr: 0.001", "r: 3", "method: linear", "tensorboard: false"):
        assert f"\n{line}\n" in config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "--model", "timm/vit_bass_patch16_224", "--data", "digits"],
            "near names are timm/vit_base_patch16",
        ),
        (["finetune", "--model", "demo/letters_vit", "--data", "digitz"], "near names are digits"),
        (["finetune", *QUICK, "--method", "selectiv"], "method='selectiv' is not 'selective', 'lora',"),
        (["finetune", *QUICK, "--lr", "-1"], "lr=-1.0 is out of range"),
        (["finetune", *QUICK, "--config", "absent.yaml"], "absent.yaml does not exist"),
        (["finetune", "--resume", "absent"], "absent holds no checkpoint"),
        (["finetune", *QUICK, "--target-modules", "qvk"], "'qvk' matches no module; near names are 'qkv'"),
        (["finetune", *QUICK[2:]], "no model was named; use --model timm/NAME"),
        (["finetune", *QUICK, "--data", "imagefolder:absent"], "absent is not a folder"),
        (["evaluate", "absent"], "absent does not exist; give the folder of a run"),
        (["evaluate", "absent", "--k", "ten"], "k='ten' is not a list of numbers"),
        (
            ["evaluate", "absent", "--source", "letters", "--k", "5,0"],
            "k=0 is not a number of neighbours; use 1 or more",
        ),
        (["evaluate", "absent", "--k", "5"], "k='5' needs --source, the data set among whose images neighbours"),
        (["finetune", *QUICK, "--retain-weight", "3"], "retain_weight=3.0 has no effect without retain_data; add"),
        (["finetune", *QUICK, "--replay-weight", "2"], "replay_weight=2.0 has no effect without replay_data; add"),
        (["evaluate", "absent", "--shots", "some"], "shots='some' is not a list of numbers; write 1,2,4,8,16"),
        (["evaluate", "absent", "--eval", "imagenet-b"], "test set 'imagenet-b' is unknown; near names are imagenet"),
        (["evaluate", "absent", "--zero-shot", "digitz"], "data='digitz' is unknown; near names are digits"),
        (["reproduce", "forgetting"], "protocol 'forgetting' is unknown; use forgetting-clip or"),
        (["reproduce", "forgetting-clip", "--set", "lr"], "--set 'lr' is not of the form NAME=VALUE"),
        (["reproduce", "forgetting-clip", "--eval", "imagenet-b"], "test set 'imagenet-b' is unknown"),
        (["merge", "absent", "--out", "x"], "absent does not exist; give an adapter directory, or a run"),
        (["inspect", "absent"], "selective.json does not exist"),
        (["report", "absent"], "absent does not exist; give the folder of a run"),
        (["report", ".", "--out", "."], "--out . is a folder; name a file, such as report.html"),
        (["report", "."], "holds no metrics.jsonl"),
    ],
)
def test_an_error_is_one_line_with_the_remedy_and_exit_code_2(
    slora: Callable[..., Outcome], arguments: list[str], message: str
) -> None:
    outcome = slora(*arguments)
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in outcome.err + outcome.out


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from slora.cli.errors import warnings_as_lines

    monkeypatch.setenv("SLORA_TRACEBACK", "")
    with warnings_as_lines():
        warnings.simplefilter("always")
        warnings.warn("two\n  lines", stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "128"], "batch_size=128 exceeds the 80 training images; use 80 or less"),
        (["--gradient-accumulation", "11"], "gradient_accumulation=11 times batch_size=8 exceeds the 80 training"),
    ],
)
def test_too_few_images_leave_no_directory(slora: Callable[..., Outcome], flags: list[str], message: str) -> None:
    outcome = slora("finetune", *QUICK, *flags, "--out", "run")
    assert outcome.code == 2
    assert message in outcome.err
    assert not Path("run").exists()


def test_errors_are_red_on_a_terminal(slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert slora("inspect", "absent").err.startswith("\x1b[31merror: ")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_traceback_is_shown_when_asked_for(
    slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from slora import CheckpointError

    arguments = ["inspect", "absent"]
    if how == "option":
        arguments.insert(0, "--traceback")
    else:
        monkeypatch.setenv("SLORA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["slora", *arguments])
    with pytest.raises(CheckpointError):
        app.main()


def test_zero_is_no_wish_for_a_traceback(slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_TRACEBACK", "0")
    assert slora("inspect", "absent").code == 2


def test_an_error_of_the_system_names_its_file(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = slora("finetune", *QUICK, "--out", "file/run")
    assert outcome.code == 2
    assert "file/run" in outcome.err


def test_a_wrong_option_is_reported_by_the_parser(slora: Callable[..., Outcome]) -> None:
    outcome = slora("finetune", "--learning-rate", "1")
    assert outcome.code == 2
    assert "No such option: --learning-rate" in outcome.err


def test_without_the_training_extra_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "typer", None)
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        'this command needs the training extra; install it with: pip install "slora[train]". '
        "Without it only slora doctor works\n"
    )


def test_doctor_needs_no_training_extra() -> None:
    import subprocess

    block = "import sys; sys.modules.update(dict.fromkeys(['typer', 'rich', 'yaml', 'jinja2', 'accelerate']))\n"
    script = block + "sys.argv = ['slora', 'doctor']\nimport slora.cli\nslora.cli.main()"
    module = block + "import runpy\nrunpy.run_module('slora.cli.doctor', run_name='__main__')"
    reports = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for code in (script, module)
    ]
    for report in reports:
        assert report.stdout.startswith("slora ")
        assert report.stderr == ""


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(
    slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch.nn.functional as F

    calls = 0

    def interrupting(smoothing: float) -> Any:
        def criterion(logits: Any, labels: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                signal.raise_signal(signal.SIGINT)
            return F.cross_entropy(logits, labels)

        return criterion

    with monkeypatch.context() as patch:
        patch.setattr("slora.training.trainer._cross_entropy", interrupting)
        outcome = slora("finetune", *QUICK)
    assert outcome.code == 130
    assert "checkpoints/step-00000003 is complete" in outcome.out
    command = outcome.out.strip().rpartition("Resume with: slora ")[2].split()
    assert command == ["finetune", "--resume", "runs/letters_vit-digits-selective"]
    outcome = slora(*command)
    assert outcome.code == 0, outcome.err
    assert "4 steps in" in outcome.out


def test_demo_and_report_hand_over_their_arguments(
    slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "slora.demo.run", types.SimpleNamespace(main=lambda *a: calls.append(a)))
    assert slora("demo").code == 0
    assert slora("demo", "--out", "there", "--seeds", "1", "--quick", "--open", "--full", "--jobs", "2").code == 0
    assert calls == [
        (Path("slora-demo"), None, False, False, False, None),
        (Path("there"), 1, True, True, True, 2),
    ]
    (tmp_path / "metrics.jsonl").write_text("")
    assert slora("report", ".").out == "page\n"


def test_a_missing_report_does_not_cost_the_result(
    slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "slora.report", None)
    outcome = slora("finetune", *QUICK)
    assert outcome.code == 0
    assert "no report was written: slora report cannot be imported" in outcome.out


def test_doctor_shows_versions_and_how_to_get_what_is_missing(
    slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    import torch

    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "timm":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("SLORA_BACKEND", "fastest")
    outcome = slora("doctor")
    assert outcome.code == 0
    rows = dict(line.split("  ", 1) for line in outcome.out.splitlines() if "  " in line.strip())
    assert rows["torch"].strip() == torch.__version__.split("+")[0] or torch.__version__ in outcome.out
    for name in ("python", "triton", "open_clip_torch", "peft", "transformers", "GPU", "Triton kernels", "slora._C"):
        assert rows[name].strip()
    assert "forms.json" in rows["measured choices"]
    assert rows["timm"].strip() == "missing"
    assert 'timm: pip install "slora[train]"' in outcome.out
    assert "SLORA_BACKEND='fastest' is unknown" in rows["SLORA_BACKEND"]


HEAVY = ("torch", "torchvision", "timm", "open_clip", "accelerate", "numpy")


def without_torch(*arguments: str) -> tuple[int, str]:
    """Run a command line in a new interpreter, which must not import anything heavy; return its code and output."""
    import subprocess

    code = (
        f"import sys; sys.argv = {['slora', *arguments]!r}\n"
        f"import slora.cli\n"
        f"try:\n    slora.cli.app.main()\n"
        f"finally:\n    assert 'torch' not in sys.modules\n    print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["fintune"], 2, "No such command 'fintune'"),
        (["finetune", "--lrr", "1"], 2, "No such option: --lrr"),
        (["finetune", "--lr", "abc"], 2, "Invalid value for '--lr'"),
        (["finetune", "--method", "foo"], 2, "method='foo' is not 'selective', 'lora', 'full' or 'linear'"),
        (["finetune", "--data", "digitz"], 2, "data='digitz' is unknown; near names are digits"),
        (["finetune", "--data", "digits", "--model", "vit"], 2, "model='vit' does not say where it comes from"),
        (["finetune", "--data", "digits", "--model", "demo/leters"], 2, "near names are demo/letters_vit"),
        (["finetune", "--data", "digits", "--model", "timm/x", "--modules-to-save", "?"], 2, "modules_to_save='?'"),
        (["finetune", "--resume", "absent"], 2, "absent holds no checkpoint"),
        (["inspect", "absent"], 2, "selective.json does not exist"),
        (["finetune", "--help"], 0, "Fine-tune a pretrained model"),
        (["--version"], 0, "slora "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_and_help_are_answered_without_torch(arguments: list[str], code: int, text: str) -> None:
    found, output = without_torch(*arguments)
    assert found == code
    assert text in output


def test_settings_that_a_resumed_run_has_to_keep_are_checked_without_torch(
    slora: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert slora("finetune", *QUICK, "--max-steps", "1", "--out", "run").code == 0
    code, output = without_torch("finetune", "--resume", "run", "--batch-size", "9")
    assert code == 2
    assert "was written with batch_size=8, this run has 9" in output
    code, output = without_torch("finetune", *QUICK, "--out", "run")
    assert code == 2
    assert "run already holds a run" in output
    for command in (["inspect", "run"], ["merge", "run", "--out", "x"], ["evaluate", "run"]):
        code, output = without_torch(*command, "--checkpoint", "bset")
        assert code == 2
        assert "checkpoint='bset' is neither best nor last nor a step number" in output
    code, output = without_torch("evaluate", "run", "--source", "lettters")
    assert code == 2
    assert "near names are letters" in output


def test_the_version_is_stated_once(slora: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    from slora import __version__

    assert slora("--version").out == f"slora {__version__}\n"
    assert version("slora") == __version__
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert __version__ not in text
    assert 'version = {attr = "slora.__version__"}' in text
    monkeypatch.setattr(app, "typer", None)
    assert slora("--version").out == f"slora {__version__}\n"


def readme_lines() -> str:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.split("## The command line")[1].split("\n## ")[0]
    return "\n".join(section.split("```")[1::2]).replace("\\\n", " ")


def help_lines() -> str:
    from typer.main import get_command

    from slora.cli.app import app

    group: Any = get_command(app())
    text = "\n".join(command.help.split("Example")[1] for command in group.commands.values())
    return "\n".join(line.strip() for line in text.replace("\\\n", " ").splitlines())


@pytest.mark.parametrize("lines_of", [readme_lines, help_lines])
def test_every_documented_command_line_is_understood(lines_of: Callable[[], str]) -> None:
    import shlex

    import click
    from typer.main import get_command

    from slora.cli.app import app

    lines = [line for line in lines_of().splitlines() if line.startswith("slora ")]
    assert len(lines) >= 7
    group = get_command(app())
    for line in lines:
        _, name, *arguments = shlex.split(line, comments=True)
        command = group.get_command(click.Context(group), name)
        assert command is not None, line
        command.make_context(name, arguments)
