"""What holds for every test: annotations are checked, uninitialised memory is NaN, nothing outside is reached.

The import hook has to come before anything imports roost: modules already imported stay unchecked.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

SOURCE = Path(__file__).parents[1] / "src"


def _checked(module: str) -> bool:
    """Modules of roost that use jaxtyping; the rest is left to pyright, and hot loops over plain values stay fast."""
    path = SOURCE.joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return module.split(".")[0] == "roost" and any("jaxtyping" in file.read_text() for file in files if file.is_file())


install_import_hook("roost", "typechecking.on_return").hook.should_instrument = _checked

settings.register_profile("roost", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("roost-ci", settings.get_profile("roost"), derandomize=True, database=None)
settings.load_profile("roost-ci" if os.environ.get("CI") else "roost")


def pytest_addoption(parser: pytest.Parser) -> None:
    """For builds that are not installed, such as that of `make sanitize`."""
    parser.addoption("--native-library", metavar="FILE", help="test this build of the native library; it must load")


def pytest_configure(config: pytest.Config) -> None:
    """Point the loader at the file of --native-library before anything loads."""
    if file := config.getoption("--native-library"):
        from roost import native

        native.places = lambda: [Path(file)]
        native.library()


@pytest.fixture(autouse=True, scope="session")
def strict_torch() -> None:
    """One thread (tests run side by side); memory that nobody wrote is NaN, so that reading it cannot pass."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked: for `torch.compile`, which cannot trace through the checker."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def heap_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`roost train` in this process must not set the allocator for all tests: some measure memory."""
    monkeypatch.setattr("roost.training.heap.keep_freed_memory", lambda: False)


@pytest.fixture(autouse=True, scope="session")
def only_loopback() -> Iterator[None]:
    """Any connection that would leave the machine raises."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if self.family in (socket.AF_INET, socket.AF_INET6) else "localhost"
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise RuntimeError(f"a test tried to reach {address}; tests use no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, visibly, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
