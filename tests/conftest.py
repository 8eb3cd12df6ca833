"""What every test shares: one thread, no network, a private cache, and deprecations as errors."""

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile

# Before torch and transformers are imported, and inherited by every process that a test starts.
_HF_HOME = tempfile.mkdtemp(prefix="crosslayer-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRACKIO_DIR=os.path.join(_HF_HOME, "trackio"),  # read when trackio is imported, whoever does it first
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

DEPRECATIONS = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")


def pytest_configure(config):
    """Deprecation warnings that our own code triggers are errors; other people's stay warnings."""
    for category in DEPRECATIONS:
        config.addinivalue_line("filterwarnings", rf"error::{category}:(crosslayer|test_)")


class _Deprecations(logging.Handler):
    """transformers announces most deprecations through its logger, not through `warnings`."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_deprecation_logged():
    """Fails a test during which transformers logged a deprecation."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, "deprecated use of transformers: " + "; ".join(handler.messages)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def libraries_speak():
    """What one test silences, as the command line does, is heard again in the next."""
    name = "transformers.utils.logging"
    before = sys.modules[name].get_verbosity() if name in sys.modules else logging.WARNING
    yield
    if name in sys.modules:
        sys.modules[name].set_verbosity(before)


@pytest.fixture(autouse=True)
def interrupts_are_pytests():
    """A command run in this process takes Ctrl-C over for good; the next test has it back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) is not before:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, before)
