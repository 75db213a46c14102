"""Before any test: no bars on stderr, where tests look for exactly one line."""

from __future__ import annotations

from transformers.utils import logging

logging.disable_progress_bar()
