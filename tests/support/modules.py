"""What modules of any model do while a test watches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.modules.module import register_module_forward_pre_hook


@contextlib.contextmanager
def no_module_runs() -> Iterator[None]:
    """No module is called: neither the model, nor its probe, nor an assistant, nor an encoder."""
    ran: list[str] = []
    handle = register_module_forward_pre_hook(lambda module, *_: ran.append(type(module).__name__))
    try:
        yield
    finally:
        handle.remove()
    assert not ran
