"""Settings that name several hosts."""

from shared.host_urls import host_urls
from shared.messaging.hosts import Hosts
from shared.messaging.management import vhost_of


def test_a_single_url_is_one_host() -> None:
    assert host_urls("amqp://u:p@one:5672/v") == ["amqp://u:p@one:5672/v"]


def test_urls_are_separated_by_commas_and_a_password_may_contain_a_comma() -> None:
    one, two, three = "amqp://u:a,b@one:5672/v", "amqps://u:c@two/v", "redis://:x,@three:1/0"
    assert host_urls(f"{one},{two} , {three}") == [one, two, three]


def test_hosts_are_tried_in_turn_and_each_url_asks_for_heartbeats() -> None:
    hosts = Hosts("amqp://u:p@one/v,amqp://u:p@two/v?heartbeat=3")
    seen = []
    for _ in range(3):
        seen.append(hosts.url)
        hosts.turn()
    assert seen == ["amqp://u:p@one/v?heartbeat=10", "amqp://u:p@two/v?heartbeat=3", "amqp://u:p@one/v?heartbeat=10"]


def test_the_vhost_is_read_from_a_list_of_urls() -> None:
    assert vhost_of("amqp://u:p@one:1/a%2Fb,amqp://u:p@two:2/a%2Fb") == "a/b"
