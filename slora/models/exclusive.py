"""Changes of weights: one thread at a time, and not interrupted by Ctrl-C or other signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = tuple(signal.valid_signals())

changing = threading.RLock()
"""Held by inject, unload, merge, unmerge, loading and saving. One for all models, since the same layers may be reached
through a model, its wrapper and a part of it; it is held for milliseconds. Reentrant."""


class _Held:
    """Replaces the handlers of all signals: collects signals while `holding`, then passes them on."""

    def __init__(self) -> None:
        self.holding = True
        self.handlers: dict[int, Any] = {}
        self.arrived: list[tuple[int, FrameType | None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.holding:
            self.arrived.append((number, frame))
        else:
            self.handlers[number](number, frame)

    def install(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self.handlers[number] = handler
                signal.signal(number, self)

    def release(self) -> None:
        # The stack goes on after an exception: every handler is restored and called, whatever another one raises.
        self.holding = False
        with contextlib.ExitStack() as stack:
            for number, frame in reversed(self.arrived):
                stack.callback(self.handlers[number], number, frame)
            for number, handler in self.handlers.items():
                stack.callback(signal.signal, number, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Call the Python handlers of signals that arrive inside only at the end, where they may raise.

    So no KeyboardInterrupt comes between writing weights and recording that they are written. Python runs handlers in
    the main thread alone: other threads need nothing, and get nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _Held()
    try:
        held.install()
        yield
    finally:
        held.release()
