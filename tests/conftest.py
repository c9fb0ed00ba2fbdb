"""What all tiers share: the repository importable by its top-level names, and one live server where a tier asks for it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# At the end, never at the front: `nodes` must stay the host's module where a test runs the host in process.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from devtools.comfy_server import KEEP_RESULTS, ComfyServer
from devtools.environment import Host, SetupError


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="that the host computes on in the tiers host and server")


@pytest.fixture(scope="session")
def prepared_host():
    """The ComfyUI that dev.py prepared."""
    try:
        return Host.from_environ()
    except SetupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(prepared_host, tmp_path_factory, request):
    """A running ComfyUI with this pack; it writes to a temporary folder."""
    device = request.config.getoption("--device")
    work = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(prepared_host, work, device=device, options=KEEP_RESULTS) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    """Every registered node's schema."""
    return server.object_info()
