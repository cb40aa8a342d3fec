"""Seeds, threads, and one parameter per backend that can run here; the package itself is asked which can."""

import os

# Before torch starts OpenMP: waiting threads sleep. Spinning ones make small calls ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import hivilt

NAMES = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def verdict(name: str, device: str) -> str | None:
    """None when the backend takes a small call on the device, else its reason."""
    x = torch.ones(1, 1, 2, 2, device=device)
    try:
        hivilt.ops.topk_attention(x, x, x, 1, backend=name)
    except hivilt.BackendError as refusal:
        return str(refusal)
    return None


VERDICTS = {(name, device): verdict(name, device) for name in NAMES for device in DEVICES}
RUNNING = [where for where, reason in VERDICTS.items() if reason is None]


@pytest.fixture(params=RUNNING, ids=["-".join(dict.fromkeys(where)) for where in RUNNING])
def where(request) -> tuple[str, str]:
    """A backend that can run here and the device it runs on."""
    return request.param


@pytest.fixture
def backend(where) -> str:
    return where[0]


@pytest.fixture
def device(where) -> str:
    return where[1]


@pytest.fixture
def verdicts() -> dict[tuple[str, str], str | None]:
    """Reason of refusal, or None, for every (backend, device)."""
    return VERDICTS


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same seed, with two threads and torch's defaults."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def nan_filled_memory():
    """Fresh memory holds NaN (integers: the maximum), so that reading what was never written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
