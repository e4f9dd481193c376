"""A few steps in a process of its own, before anything is trained: some shapes end the process that tries them.

PyTorch 2.13's backward pass on a CPU crashes for some narrow shapes whose channels are last in memory.

    python -m mlvgm.training.trial SETTINGS_AS_JSON DEVICE THREADS CHANNELS_LAST
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from mlvgm.training.settings import Settings, TrainingError

TIMEOUT = 900
STEPS = 3


@dataclass(frozen=True)
class Trial:
    """What steps cost.

    Attributes:
        seconds: of the last one.
        memory: of the host, at most, in bytes.
        parameters: of the network.
        channels_last: whether PyTorch can train it in that order in memory.
    """

    seconds: float
    memory: int
    parameters: int
    channels_last: bool


def try_step(settings: Settings, device: str, threads: int = 0) -> Trial:
    """Make a few steps on random images.

    Raises:
        TrainingError: the forward or the backward pass fails; says how.
    """
    done = _run(settings, device, threads, channels_last=True)
    if done.returncode < 0:
        done = _run(settings, device, threads, channels_last=False)
    if done.returncode == 0:
        return Trial(**json.loads(done.stdout))
    shape = f"latents_per_scale {list(settings.shape.latents_per_scale)}, channels {settings.shape.channels}"
    if done.returncode < 0:
        raise TrainingError(
            f"a step with this shape ({shape}) ended its process by signal {-done.returncode}: it needs more memory "
            "than there is, or is a shape that this PyTorch cannot train; choose another"
        )
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    raise TrainingError(f"a step with this shape ({shape}) fails: {reason}")


def _run(settings: Settings, device: str, threads: int, channels_last: bool) -> "subprocess.CompletedProcess[str]":
    words = [json.dumps(settings.as_mapping()), device, str(threads), str(int(channels_last))]
    command = [sys.executable, "-m", "mlvgm.training.trial", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise TrainingError(f"{STEPS} steps took more than {TIMEOUT} s: choose a smaller size") from None


def main() -> None:
    import torch

    from handlers.fields import read_strict
    from mlvgm.training.nvae import begin, step

    settings = read_strict(Settings, json.loads(sys.argv[1]))
    device, channels_last = torch.device(sys.argv[2]), sys.argv[4] == "1"
    if threads := int(sys.argv[3]):
        torch.set_num_threads(threads)
    state = begin(settings, device, channels_last)
    images = torch.rand(settings.batch, 3, settings.image_size, settings.image_size, device=device)
    for _ in range(STEPS):
        started = time.monotonic()
        bound, _ = step(state, settings, images)
        finite = bool(torch.isfinite(bound.log_likelihood).all())
        seconds = time.monotonic() - started
    if not finite:
        raise SystemExit("the likelihood is not finite")
    result: dict[str, Any] = {
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "channels_last": channels_last,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
