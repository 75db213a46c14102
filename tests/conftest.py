"""Before any test: no bars on stderr, where tests look for exactly one line; and Ctrl-C reaches the programs that tests start."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()

# A shell that starts us in the background ignores SIGINT for us, and what is ignored stays so in our children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads of so small a model mostly wait for each other."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    """Sets how many cores torch believes in."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
