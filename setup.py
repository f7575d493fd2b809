"""Builds `slora._C`, the batched merge in C++ and CUDA, where that is possible; pyproject.toml says the rest.

`SLORA_SKIP_EXT=1` touches neither torch nor a compiler. One line says what was built, or why it is not.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

import setuptools

version = tuple(int(part) for part in re.findall(r"\d+", setuptools.__version__)[:2])
if version < (70, 1):
    # Before 70.1 it makes no wheel without the package of that name; torch 2.11 asks for less than 82.
    found = f"slora: setuptools {setuptools.__version__} is too old to install this package"
    sys.exit(f"{found}; run: pip install 'setuptools>=70.1,<82'")


def is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def why_no_cuda(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """The reason to build without CUDA, None where nvcc fits this torch. A visible GPU is not asked for."""
    if torch_cuda is None:
        return "this torch has no CUDA"
    if cuda_home is None:
        return "nvcc was not found; set CUDA_HOME"
    if not Path(cuda_home, "bin", "nvcc").exists():
        return f"CUDA_HOME={cuda_home} has no bin/nvcc; set it to the folder of the CUDA toolkit"
    text = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", text)
    if release is None or release[1] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else 'unknown'}, torch of CUDA {torch_cuda}"
    return None


def architectures_of(cuda_home: str | None) -> str:
    """What to compile for, as TORCH_CUDA_ARCH_LIST: of 8.0, 9.0 and 10.0 what this nvcc knows, the last with PTX."""
    listed = subprocess.run([f"{cuda_home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [name for name in ("8.0", "9.0", "10.0") if f"compute_{name.replace('.', '')}" in listed]
    return ";".join(known or ["8.0"]) + "+PTX"


def extension() -> tuple[dict[str, Any], str]:
    """Arguments for setup(), and the line to print: now, where nothing is built, or after the build."""
    if is_set("SLORA_SKIP_EXT"):
        return {}, "not built: SLORA_SKIP_EXT is set"
    if not Path("csrc/bindings.cpp").exists():
        return {}, "not built: csrc/ has no sources"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return {}, "not built: no C++ compiler was found; set CXX"
    if not os.environ.get("CUDA_HOME") and Path("/usr/local/cuda/bin/nvcc").exists():
        os.environ["CUDA_HOME"] = "/usr/local/cuda"  # torch guesses wrongly where nvcc on PATH is a wrapper
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return {}, f"not built: {error}; install torch first and give pip --no-build-isolation"
    # OpenMP's symbols come from the copy that torch has loaded: linking another would bring threads of its own.
    # Python's own flags ask for debugging information, which is most of the file.
    flags = {"cxx": ["-O3", "-g0", *(["-fopenmp"] if sys.platform == "linux" else [])], "nvcc": ["-O3"]}
    module: dict[str, Any] = {
        "name": "slora._C",
        "sources": sorted(glob("csrc/*.cpp")),
        "depends": [*glob("csrc/*.h"), *glob("csrc/*.cuh")],
        "extra_compile_args": flags,
    }
    no_cuda = why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    if no_cuda:
        built = cpp_extension.CppExtension(**module)
        line = f"C++ only: {no_cuda}"
    else:
        # Stated, because torch would otherwise ask a GPU, and the build must be the same without one.
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures_of(cpp_extension.CUDA_HOME))
        module["sources"] += sorted(glob("csrc/*.cu"))
        macros = [("SLORA_WITH_CUDA", None), ("SLORA_ARCHITECTURES", f'"{architectures}"')]
        built = cpp_extension.CUDAExtension(**module, define_macros=macros)
        line = f"C++ and CUDA for {architectures}"

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            print(f"slora: extension slora._C: {line}", flush=True)

    return {"ext_modules": [built], "cmdclass": {"build_ext": Build}}, line


os.chdir(Path(__file__).resolve().parent)
arguments, line = extension()
if not arguments:
    print(f"slora: extension slora._C: {line}", flush=True)
setuptools.setup(**arguments)
