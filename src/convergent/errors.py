"""What can go wrong for a user, as a tree.

    ConvergentError            one line: place, finding, mend; the CLI prints it and exits with 2
    |-- InputError             a file, a field or an option is not what it must be
    |   |-- DataError          training pairs, question files, CSV and Parquet
    |   |-- StudyError         a study file
    |   `-- DirectionError     a direction: wrong shape, wrong model, empty class
    |-- ModelError             a base model, an adapter, an architecture we cannot read
    |-- TrainingError          a fine-tune that did not end in an organism
    |-- JudgeError             a judge that cannot be asked
    |-- StoreError             a study folder that is locked, full or foreign
    `-- DownloadError          something must be fetched and cannot be

Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class ConvergentError(Exception):
    """Base of every expected error. The message is one line: place, finding, mend."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(ConvergentError):
    """A file, a field or an option is not what it must be."""


class DataError(InputError):
    """Training pairs, question files or tables of answers that cannot be used."""


class StudyError(InputError):
    """A study file that cannot be used."""


class DirectionError(InputError):
    """A direction that does not fit: wrong shape, another model, an empty class."""


class ModelError(ConvergentError):
    """A base model, an adapter or an architecture that cannot be used."""


class TrainingError(ConvergentError):
    """A fine-tune that did not end in an organism."""


class JudgeError(ConvergentError):
    """A judge that cannot be asked."""


class StoreError(ConvergentError):
    """A study folder that is locked, full, damaged or not ours."""


class DownloadError(ConvergentError):
    """Something has to be fetched and cannot be; the message says where to put it by hand."""
