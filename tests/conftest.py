"""The process that every test runs in: no Hub, no cache but a temporary one, one thread."""

import os
import tempfile


def pytest_configure(config):
    """Set what torch and huggingface_hub read once, when they are imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and pytest-xdist keeps all cores busy
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if config.option.markexpr == "network":
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Remote code is copied into this cache when it is loaded: a lasting one could serve the file of an earlier run.
    cache = tempfile.TemporaryDirectory(prefix="sam-split-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_HOME"] = cache.name
