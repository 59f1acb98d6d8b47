"""The world of the model, on a Redis of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.model.world import World
from tests.rigs.servers import Servers


@pytest.fixture
def world(servers: Servers) -> Iterator[World]:
    server = servers.extra_redis()
    logging = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        world = World(server.url, Path(folder))
        yield world
    world.run(world.server.close())
    world.loop.close()
    structlog.configure(**logging)
    server.discard()
