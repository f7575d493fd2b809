"""`slora doctor`: shows versions, the GPU, which parts of slora are installed, and how to install the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from slora.errors import ConfigError

_TRAIN = 'pip install "slora[train]"'
PACKAGES = {
    "torch": "pip install torch",
    "triton": 'comes with torch on Linux; else: pip install "slora[triton]"',
    "torchvision": _TRAIN,
    "timm": _TRAIN,
    "open_clip_torch": _TRAIN,
    "accelerate": _TRAIN,
    "peft": "only to load adapters there: pip install peft",
    "transformers": "only to adapt its models: pip install transformers",
}


def findings() -> list[str]:
    """Return the lines of the report."""
    import torch

    import slora
    from slora.merging import extension_info
    from slora.ops.backends.autotune import describe_cache
    from slora.ops.dispatch import computed_by, setting

    rows = [("slora", slora.__version__), ("python", platform.python_version())]
    missing = []
    for package, remedy in PACKAGES.items():
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "missing"))
            missing.append(f"{package}: {remedy}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            memory = device.total_memory / 2**30
            rows.append((f"GPU {i}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"))
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        rows.append(("GPU", f"none is visible ({built}); everything runs on the CPU"))
    kernels = importlib.util.find_spec("slora.kernels.linear") is not None
    rows.append(("Triton kernels", "installed" if kernels else "not in this installation; use SLORA_BACKEND=torch"))
    extension = extension_info()
    if extension["available"]:
        architectures = ", ".join(extension["architectures"])
        cuda = f"CUDA {extension['cuda']} for {architectures}" if extension["cuda"] else "no CUDA"
        built = f"built by {extension['compiler']} for torch {extension['torch']}"
        rows.append(("slora._C", f"{built}; {cuda}; on this processor {extension['cpu']}"))
    else:
        rows.append(("slora._C", f"{extension['reason']}; merging runs in plain PyTorch"))
        missing.append("slora._C: build it with a C++ compiler: pip install --no-build-isolation -e .")
    try:
        rows.append(("SLORA_BACKEND", f"{setting()}: {computed_by(torch.cuda.is_available())}"))
    except ConfigError as error:
        rows.append(("SLORA_BACKEND", str(error)))
    rows.append(("measured choices", describe_cache()))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    return lines + (["", "missing:", *(f"  {entry}" for entry in missing)] if missing else ["", "nothing is missing"])


def doctor() -> None:
    """Show versions, the GPU, which parts of slora are installed, and how to install the others.

    \b
    Example:
        slora doctor
    """
    print("\n".join(findings()))


if __name__ == "__main__":
    doctor()
