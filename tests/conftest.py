"""Seeds, threads, and one parameter per backend that can run here; the package itself is asked which can."""

import functools
import importlib.util
import os

# Before torch starts OpenMP: waiting threads sleep. Spinning ones make small calls ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pairs

import hivilt

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.make_fast()

NAMES = ("reference", "cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def small_call(operation: str, device: str) -> tuple:
    """Arguments of a call that every backend with kernels of an operation takes."""
    x = torch.ones(1, 4, 8, device=device)
    return {
        "topk_attention": (x[None], x[None], x[None], 1),
        "scale_fusion": ([x], torch.ones(8, 8, device=device)),
        "interpolate_tokens": (x, (4,), (8,)),
        "interpolate_add": (x, x),
        "token_pool": (x, x[0], None, x[0, :1, :4], None, x[0, 0, :3]),
        "bank_retrieval": (x[0], x[0], 1),
        "contrastive_loss": (x[0], x[0], 1.0),
    }[operation]


@functools.cache
def verdict(name: str, device: str, operation: str = "topk_attention") -> str | None:
    """None when the backend takes a small call of the operation on the device, else its reason."""
    try:
        getattr(hivilt.ops, operation)(*small_call(operation, device), backend=name)
    except hivilt.BackendError as refusal:
        return str(refusal)
    return None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption(
        "--interpret-all",
        action="store_true",
        help="every case of every test through Triton's interpreter, and the whole product of all parameters",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "operation(name): `where` leaves out backends without kernels of this one")
    config.addinivalue_line("markers", "interpreted: small enough to go through Triton's interpreter in every test run")
    config.addinivalue_line("markers", "pairwise: of all cases, some in which any two values of parameters meet")
    config.addinivalue_line("markers", "kernels: not for the reference, which is torch's operators alone")


def pytest_collection_modifyitems(config, items):
    """Leaves out backends without kernels of the operation that a test is about, and what pairs make superfluous.

    Through the interpreter, where a small call takes a second, go malformed calls, one case of each test of masks and
    of lists (not of banks, which are long), and what is marked; test_triton_*.py walk through every kernel at sizes
    made for it.
    """
    absent = {id(item) for item in items if why_absent(item)}
    deselect(config, items, absent)
    if config.getoption("--interpret-all"):
        return
    deselect(config, items, pairs.beyond(items))
    if not INTERPRETED:
        return
    groups: dict[str, list] = {}
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("where") == ("triton", "cpu"):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    dropped = set()
    for name, group in groups.items():
        if "errors" not in name and not group[0].get_closest_marker("interpreted"):
            one = ("masks" in name or "select" in name) and "bank" not in name
            kept = group[len(group) // 2] if one else None
            dropped.update(id(item) for item in group if item is not kept)
    deselect(config, items, dropped)


def why_absent(item) -> str | None:
    """Why the backend of a test has no kernels of its operation."""
    mark, parameters = item.get_closest_marker("operation"), getattr(item, "callspec", None)
    where = parameters.params.get("where") if parameters else None
    if where and where[0] == "reference" and item.get_closest_marker("kernels"):
        return "torch's operators alone"
    return verdict(*where, mark.args[0]) if mark and where else None


def deselect(config, items: list, dropped: set[int]) -> None:
    gone = [item for item in items if id(item) in dropped]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if id(item) not in dropped]


VERDICTS = {(name, device): verdict(name, device) for name in NAMES for device in DEVICES}
RUNNING = [where for where, reason in VERDICTS.items() if reason is None]


@pytest.fixture(params=RUNNING, ids=["-".join(dict.fromkeys(where)) for where in RUNNING])
def where(request) -> tuple[str, str]:
    """A backend that can run here and the device it runs on; one with kernels of the operation that a mark names."""
    return request.param


@pytest.fixture
def backend(where) -> str:
    return where[0]


@pytest.fixture
def device(where) -> str:
    return where[1]


@pytest.fixture
def ask():
    """``ask(backend, device, operation)``: None, or why the backend cannot run the operation."""
    return verdict


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
