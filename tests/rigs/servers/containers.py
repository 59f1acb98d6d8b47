"""The servers as containers. Their host ports are fixed, so that a restarted server keeps its address."""

import contextlib
import socket
import time
import urllib.error
from collections.abc import Callable

import docker
from docker.errors import APIError, DockerException, NotFound
from requests.exceptions import RequestException
from testcontainers.core.container import DockerContainer

from deploy.local import database
from deploy.local.port_check import find_free
from deploy.local.servers import PASSWORD
from shared.messaging.management import ask
from tests.rigs.servers import PostgreSQL, RabbitMQ, Redis, Servers

_START_TIMEOUT_SECONDS = 90.0  # without the time to pull an image


def engine_answers() -> bool:
    try:
        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except (DockerException, RequestException, OSError):
        return False


class Container:
    def __init__(self, image: str, ports: dict[int, int], answers: Callable[[], bool]) -> None:
        """`ports`: the container's port -> the port on the host."""
        self.definition = DockerContainer(image)
        for inside, outside in ports.items():
            self.definition.ports[f"{inside}/tcp"] = ("127.0.0.1", outside)  # type: ignore[assignment]
        self._answers = answers
        self._made = False

    @property
    def _container(self) -> "docker.models.containers.Container":
        container = self.definition.get_wrapped_container()
        container.reload()
        return container

    def start(self) -> None:
        if not self._made:
            self.definition.start()
            self._made = True
        elif self._container.status != "running":
            self._container.start()
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while not self._try():
            container = self._container
            if container.status != "running" or time.monotonic() > deadline:
                log = container.logs(tail=15).decode(errors="replace")
                raise RuntimeError(f"{self.definition.image} ({container.status}) does not answer:\n{log}")
            # No event signals readiness, so the loop pauses and tries again.
            time.sleep(0.1)

    def stop(self) -> None:
        if self._made and self._container.status in ("running", "paused"):
            self.thaw()
            self._container.stop(timeout=8)

    def kill(self) -> None:
        if self._made and self._container.status in ("running", "paused"):
            self.thaw()  # not every engine kills a paused container
            self._container.kill()
            self._container.wait(timeout=10)

    def freeze(self) -> None:
        if self._made and self._container.status == "running":
            self._container.pause()

    def thaw(self) -> None:
        if self._made and self._container.status == "paused":
            self._container.unpause()

    def discard(self) -> None:
        if self._made:
            with contextlib.suppress(NotFound):
                self._container.remove(force=True, v=True)
            self._made = False

    def _try(self) -> bool:
        try:
            return self._answers()
        except (OSError, urllib.error.HTTPError, APIError):
            return False


def prepare() -> Servers:
    amqp, management, postgres_port, *redis_ports = find_free(16)
    postgres = PostgreSQL(_postgres(postgres_port), postgres_port)

    def redis() -> Redis:
        port = redis_ports.pop() if redis_ports else find_free(1)[0]
        return Redis(_redis(port), port)

    return Servers(
        RabbitMQ(_rabbitmq(amqp, management), amqp, management),
        postgres,
        redis(),
        another_redis=redis,
        clean=lambda: None,
    )


def _rabbitmq(port: int, management_port: int) -> Container:
    management_url = f"http://ticketrail:{PASSWORD}@127.0.0.1:{management_port}"

    def answers() -> bool:
        # The engine's proxy accepts connections before the server does, so only a reply of the server counts.
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if connection.recv(1) != b"\x01":
                return False
        return ask(management_url, "GET", "/api/health/checks/virtual-hosts", timeout=2) is not None

    container = Container("rabbitmq:4-management", {5672: port, 15672: management_port}, answers)
    container.definition.with_env("RABBITMQ_DEFAULT_USER", "ticketrail").with_env("RABBITMQ_DEFAULT_PASS", PASSWORD)
    return container


def _postgres(port: int) -> Container:
    superuser_url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"
    container = Container("postgres:17", {5432: port}, lambda: database.make_owner(superuser_url, PASSWORD))
    container.definition.with_env("POSTGRES_PASSWORD", PASSWORD).with_command(
        ["postgres", "-c", "max_connections=200", "-c", "timezone=UTC"]
    )
    return container


def _redis(port: int) -> Container:
    def answers() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"

    listen = ["--bind", "0.0.0.0", "--protected-mode", "no"]
    keep = ["--dir", "/data", "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    container = Container("valkey/valkey:8", {6379: port}, answers)
    container.definition.with_command(["valkey-server", *listen, *keep, "--maxmemory-policy", "noeviction"])
    return container
