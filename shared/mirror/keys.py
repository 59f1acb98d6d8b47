"""The names of all keys in the mirror. A tenant's keys have the restaurant as hash tag; the rail's own keys have none.

    {restaurant}:<entity>:<id>       hash   v version, c change id, d state, p accepted at (ms), h stock
    {restaurant}:claim:<entity>:<id> hash   v, c, e event, n number, at (ms), mirror (identity), marked, stored,
                                            h reserved items, l lane
    {restaurant}:live:<entity>       zset   id by index score (creation time): the live window
    {restaurant}:pending:<entity>    zset   id by index score: not in PostgreSQL yet
    {restaurant}:failed:<entity>     hash   id -> error, attempts, last attempt
    {restaurant}:stock:<item>        hash   count, since, next, sum; order id -> its hold (scripts/stock.lua)
    {restaurant}:number:<day>        hash   prefix -> last order number of a business day
    {restaurant}:restaurant          text   the restaurant's settings, for pricing while PostgreSQL is unavailable
    ticketrail:warm                  hash   server "<run_id>:<master_replid>" that the mirror writer has filled,
                                            identity, prefix, until (the last business day with the prefix)
    ticketrail:log                   hash   offset, crc: the position up to which the mirror writer has applied the log;
                                            broken: the largest offset from which the position has moved back
    ticketrail:feed                  hash   position, xid: how far the feed loop has read the feed (postgres/feed.py)
    ticketrail:keys                  text   identity of the mirror; set while it knows the keyed creations of 30 days
    ticketrail:claims                zset   <restaurant>|<entity>|<id> by time of the claim (ms)
    ticketrail:conflicts             set    <restaurant>|<entity>|<id> with an open conflict in PostgreSQL
    ticketrail:restaurants           set    restaurant ids
    ticketrail:bucket:<caller>       hash   t tokens, at (ms): a token bucket of the rate limits
    ticketrail:familiar:<caller>     text   1: this account or API key was used from this address; expires

Some scripts use keys of both kinds, so the mirror must be one primary with replicas, not a Redis cluster.
"""

LAYOUT_VERSION = 7
"""Raise this number with every change of a name, type or field above, so that data with another layout is not used."""

WARM = "ticketrail:warm"
LOG = "ticketrail:log"
FEED = "ticketrail:feed"
KEYS = "ticketrail:keys"
CLAIMS = "ticketrail:claims"
CONFLICTS = "ticketrail:conflicts"
RESTAURANTS = "ticketrail:restaurants"


def doc(restaurant: str, entity: str, id_: str) -> str:
    return f"{{{restaurant}}}:{entity}:{id_}"


def claim(restaurant: str, entity: str, id_: str) -> str:
    return f"{{{restaurant}}}:claim:{entity}:{id_}"


def live(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:live:{entity}"


def pending(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:pending:{entity}"


def failed(restaurant: str, entity: str) -> str:
    return f"{{{restaurant}}}:failed:{entity}"


def number(restaurant: str, business_day: str) -> str:
    return f"{{{restaurant}}}:number:{business_day}"


def stock(restaurant: str, inventory_item: str) -> str:
    return f"{{{restaurant}}}:stock:{inventory_item}"


def bucket(caller: str) -> str:
    return f"ticketrail:bucket:{caller}"


def familiar(caller: str) -> str:
    return f"ticketrail:familiar:{caller}"


def restaurant(restaurant_id: str) -> str:
    return f"{{{restaurant_id}}}:restaurant"


def member(restaurant: str, entity: str, id_: str) -> str:
    return f"{restaurant}|{entity}|{id_}"
