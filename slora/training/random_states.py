"""The states of the random generators of a process: saved and restored by a resumed run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# State words of a Mersenne Twister, which all three use on the CPU.
WORDS = 624

# Header of torch's CPU state: seed, words left in this round, whether it is seeded, index of the next word.
_HEAD = np.dtype([("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8")])


class RandomStates(NamedTuple):
    """The states of Python's, NumPy's and torch's generators."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    cuda: dict[int, Tensor]

    def restore(self) -> None:
        """Set all generators to these states; GPUs that do not exist are skipped."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                if i in self.cuda:
                    torch.cuda.set_rng_state(self.cuda[i], i)

    def values(self) -> dict[str, Any]:
        """Return the entries of the first two that are not tensors, as JSON values."""
        version, _, gauss = self.python
        name, _, _, has_gauss, cached = self.numpy
        return {"python": [version, gauss], "numpy": [name, int(has_gauss), float(cached)]}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state words: "python", "numpy", "torch", and "cuda.<number>" for each GPU."""
        numpy = [*self.numpy[1].tolist(), self.numpy[2]]
        return {
            "python": torch.tensor(self.python[1], dtype=torch.int64),
            "numpy": torch.tensor(numpy, dtype=torch.int64),
            "torch": self.torch,
            **{f"cuda.{i}": state for i, state in self.cuda.items()},
        }


def present() -> RandomStates:
    """Return the present states."""
    return RandomStates(
        random.getstate(),
        np.random.get_state(legacy=True),  # type: ignore[arg-type]
        torch.get_rng_state(),
        dict(enumerate(torch.cuda.get_rng_state_all())) if torch.cuda.is_available() else {},
    )


def parsed(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RandomStates:
    """Return the states that `RandomStates.values` and `tensors` returned, checked so that `restore` cannot fail.

    The generators do not check them: one with a position beyond its words reads past their end.

    Raises:
        ValueError: a state is missing or invalid; names the generator.
    """
    for kind, count in (("python", 2), ("numpy", 3)):
        _require(kind, isinstance(values.get(kind), list) and len(values[kind]) == count and kind in tensors)
    _require("torch", "torch" in tensors)
    version, gauss = values["python"]
    _require("python", version == 3 and type(version) is int and (gauss is None or _is_finite(gauss)))
    python = version, tuple(_words("python", tensors["python"])), gauss
    name, has_gauss, cached = values["numpy"]
    _require("numpy", name == "MT19937" and type(has_gauss) is int and has_gauss in (0, 1) and _is_finite(cached))
    *keys, position = _words("numpy", tensors["numpy"])
    numpy = name, np.array(keys, dtype=np.uint32), position, has_gauss, float(cached)
    cuda = {}
    for key, state in tensors.items():
        if key.startswith("cuda.") and key[5:].isascii() and key[5:].isdecimal():
            cuda[int(key[5:])] = _of_a_gpu(key, state)
        else:
            _require(key, key in ("python", "numpy", "torch"))
    return RandomStates(python, numpy, _of_torch(tensors["torch"]), cuda)


def _words(name: str, state: Tensor) -> list[int]:
    """Check and return the state of a Mersenne Twister: its words, and its position among them."""
    _require(name, state.dtype == torch.int64 and state.shape == (WORDS + 1,))
    words: list[int] = state.tolist()
    _require(name, all(0 <= word < 1 << 32 for word in words) and words[-1] <= WORDS and any(words[:-1]))
    return words


def _of_torch(state: Tensor) -> Tensor:
    generator = torch.Generator()
    like = generator.get_state()
    _require("torch", state.dtype == like.dtype and state.shape == like.shape)
    head = np.frombuffer(state.numpy().tobytes(), _HEAD, count=1)[0]
    # Freshly seeded, or `next` words of a round are used.
    fresh = head["left"] == 1 and head["next"] == 0
    _require("torch", fresh or (head["left"] >= 1 and head["left"] + int(head["next"]) == WORDS + 1))
    try:
        generator.set_state(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the state of the random generator 'torch' is invalid ({reason})") from error
    _require("torch", torch.equal(generator.get_state(), state))
    return state.clone()


def _of_a_gpu(name: str, state: Tensor) -> Tensor:
    _require(name[:40], state.dtype == torch.uint8 and state.shape == (16,))
    seed_and_offset = state.clone()
    # The offset of a Philox generator is a multiple of 4.
    _require(name, int(seed_and_offset.view(torch.int64)[1]) % 4 == 0)
    return seed_and_offset


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _require(name: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"the state of the random generator {name!r} is missing or invalid")
