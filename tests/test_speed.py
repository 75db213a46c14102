"""The probe of the machine, and what a plan says of a machine that is not alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convergent import cli
from convergent.models.load import load_base
from convergent.store import looked_at
from convergent.study import main
from convergent.study.memory import Size, needed, size_of
from convergent.study.plan import line_tokens_per_second
from convergent.study.run import Run
from convergent.study.spec import load_study
from convergent.study.speed import Burst, Speed, measure, parameters, summed
from small_study import small_study, write_study
from tiny import tiny_model


def test_other_programs_slow_the_probe_down_and_not_the_figure() -> None:
    quiet = summed([[Burst(1e9, 0.02, 0.02), Burst(0.9e9, 0.02, 0.02)], [Burst(1e9, 0.02, 0.02)]])
    # Ten times as long by the clock, as the threads seldom ran.
    shared = summed([[Burst(1e9, 0.2, 0.02), Burst(0.9e9, 0.2, 0.02)], [Burst(1e9, 0.2, 0.02)]])
    assert quiet.flops == shared.flops == pytest.approx(1e11) and not quiet.busy
    assert shared.busy and shared.got == pytest.approx(0.1)
    assert summed([[Burst(1e9, 0.02, 0.0)]]).flops == pytest.approx(5e10), "a clock that counts nothing of so short a burst"


def test_the_probe_sees_that_the_machine_is_not_alone() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE) for _ in range(4 * cores)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        before = torch.get_num_threads()
        speed = measure("cpu", "float32")
        assert speed.busy and speed.flops > 1e8 and torch.get_num_threads() == before
    finally:
        for other in others:
            other.kill()
            other.wait()
            assert other.stdout is not None
            other.stdout.close()


@pytest.mark.parametrize(("speed", "said"), [(Speed(1e11, 0.3), True), (Speed(1e11, 0.97), False)])
def test_a_plan_says_so(speed: Speed, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "speed_of", lambda run: speed)
    path = write_study(tmp_path, small_study(tiny_model()))
    assert cli.main(["run", str(path), "--out", str(tmp_path / "out"), "--plan"]) == 0
    assert ("other programs left the probe 30% of the processors" in capsys.readouterr().out) == said


def test_the_memory_of_a_gpu_is_that_of_whole_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with looked_at(tmp_path / "out") as store:
        run = Run(load_study(write_study(tmp_path, small_study(tiny_model()))), store, compute=False)
        rows, size = run.spec.sampling.rows, Size(14e9, 48, 5120, 1024)
        cpu = needed(run, size, None).cache
        monkeypatch.setattr(run, "device", "cuda")
        per_token = 48 * 2 * 1024 * (4 if run.spec.dtype == "float32" else 2)
        panel = next(n for n in (512, 256, 128, 64, 32) if n * per_token * 1024 <= 16 << 30 or n == 32)
        assert needed(run, size, None).cache == pytest.approx(cpu / rows * -(-rows // panel) * panel) and rows % panel


def test_the_line_and_the_memory_know_the_base(tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    chat = load_base(str(base), dtype="float32")
    assert parameters(base) == sum(p.numel() for p in chat.model.parameters())
    c = chat.model.config
    assert size_of(str(base)) == Size(parameters(base), chat.n_layers, chat.d_model, c.num_key_value_heads * c.hidden_size // c.num_attention_heads)
    with looked_at(tmp_path / "out") as store:
        run = Run(load_study(write_study(tmp_path, small_study(base))), store, compute=False)
        assert line_tokens_per_second(run, Speed(2e9)) == pytest.approx(1e9 / parameters(base))
        memory = needed(run, size_of(str(base)), there=1e-6)
    assert memory.weights == pytest.approx(4 * parameters(base) / 1e9) and memory.too_much
