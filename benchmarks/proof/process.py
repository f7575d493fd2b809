"""One run of the proof, and the processes that it starts: their environment, their end, and what they said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import folder_name, write_result

ROOT = Path(__file__).parents[2]
State = dict[str, Any]


@dataclass
class Proof:
    """One run: where it writes, how it was asked for, and what the parts have said so far."""

    out: Path
    dry: bool
    stage: str | None
    """"first" or "second"; None for all parts, or for those that are named."""
    environ: dict[str, str]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    """Cases whose files this run has written."""

    @property
    def suffix(self) -> str:
        """Of the names of the files that each stage has for itself."""
        return f"-{self.stage}" if self.stage else ""

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.out / f"gpu{self.suffix}.log"

    @property
    def device(self) -> str:
        """What the cases run on."""
        return "cpu" if self.dry else "cuda"

    def call(self, command: Sequence[str | Path], limit: float, **environ: str) -> tuple[int | None, str]:
        """Run a command and return its exit code, None where it was cut at `limit`, and what it printed.

        Its output goes to the log as it comes.
        """
        with open(self.log, "ab") as file:
            file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, env={**self.environ, **environ}, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=max(0.1, limit))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # The whole group: a case has compilers and processes of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return code, self.log.read_bytes()[start:].decode(errors="replace")

    def write(self) -> None:
        """Write the state of all parts."""
        rows = {"environment": self.about, "parts": self.parts, "time": "wall clock of each part, in seconds"}
        write_result(f"proof{self.suffix}", folder_name(self.device), rows, self.out)


def state_of(code: int | None, text: str) -> State:
    """How a command ended, with its last lines where that was not well."""
    if code == 0:
        return {"state": "ok"}
    last = [line for line in text.splitlines() if line.strip()][-8:]
    return {"state": "cut" if code is None else "failed", "exit_code": code, "last_lines": last}


def environ_of(dry: bool, scratch: Path) -> dict[str, str]:
    """The environment of every part: caches in a folder that is removed."""
    environ = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        # Written once for all parts: what torch imports takes seconds to compile.
        "PYTHONPYCACHEPREFIX": str(scratch / "pyc"),
        "SLORA_CACHE": str(scratch / "choices"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    # The parts choose the backend themselves.
    environ.pop("SLORA_BACKEND", None)
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not environ.get("CUDA_HOME") and Path("/usr/local/cuda").exists():
        environ["CUDA_HOME"] = "/usr/local/cuda"
    if dry:
        environ.update(TRITON_INTERPRET="1", TORCH_COMPILE_DISABLE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return environ


def found(tool: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where the toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(tool, path=os.pathsep.join(folders))


def machine() -> dict[str, Any]:
    """The driver, the compiler and the tools that are there."""

    def said(*command: str) -> str | None:
        tool = found(command[0])
        if tool is None:
            return None
        try:
            done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = done.stdout.strip().splitlines()
        return lines[-1] if lines and done.returncode == 0 else None

    return {
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version"),
        "tools": {tool: found(tool) for tool in ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")},
    }
