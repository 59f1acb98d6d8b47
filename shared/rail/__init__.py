"""The commit makes a change durable and visible. The change takes effect once, even if a step is repeated.

    claim   (mirror)   one script takes (entity, next version) and stores the whole event in the claim
    record  (broker)   the event, confirmed by the quorum queue of its lane; else the journal of this instance
    reveal  (mirror)   the state, under the guard (version, change id); the claim is removed

The states of a change, and the effect of a crash in each state:

| state     | mirror        | broker or journal | if its owner dies or stalls in this state                        | a reader sees |
|-----------|---------------|-------------------|------------------------------------------------------------------|---------------|
| drafted   | -             | -                 | nothing has happened                                             | old           |
| claimed   | claim         | -                 | after 2 s the next writer or the reconciler records and reveals  | old           |
|           |               |                   | the same event: the change is committed late, but only once      |               |
| sent      | claim         | perhaps           | the same; recording it again changes nothing (same change id)    | old           |
| journaled | claim         | journal           | the same; the journal is drained too, by its instance when it    | old           |
|           |               |                   | returns or by another instance (orphaned_journals.py)            |               |
| recorded  | claim         | yes               | the same, or the mirror writer reads the change from the log     | old           |
| revealed  | state         | yes               | only the reply is lost; a repeat with the same key finds it      | new           |

A change is claimed, or it is refused (commit.py). A creation whose mirror takes no claim continues without one; then its
id keeps it single: the instance and both stores are asked for an earlier creation with this id (idempotency.py).

Replies other than a 2xx:

| reply | reason                                                   | what is true afterwards                             |
|-------|----------------------------------------------------------|-----------------------------------------------------|
| 409   | another change came first, or is being committed         | nothing of this change was claimed                  |
| 503   | nothing was sent, and the claim was taken back           | no reader will ever see the change                  |
| 504   | something was sent, or there may be a claim              | it may appear; repeat with the same Idempotency-Key |

After an unanswered claim every error is a 504, except the reply to a creation that names the existing entity. A client
that repeats with the same key gets the same entity, or adds the same fact, so a 504 that is repeated counts once.

Rules: a claim does not expire, and no other change takes its version while it exists. With a lease instead, a stalled
owner and its successor could both record that version. A marked claim cannot be taken back. After the first byte was
sent, the commit only goes forward. Every step may be repeated, because the change id identifies the change. The claim
carries the lane, and whoever finishes it records the change in that lane. The claim also orders stock: of a hold and a
count, the one that is claimed later gets the larger time, whatever the clocks of the hosts say.

A claim is valid only as long as its Redis process runs. A claim that a restart or a failover brings back is removed: its
owner may have taken it back and replied 503 after that copy was made. If the owner is alive, it continues without the
claim.

Without a warm mirror there are no claims. Changes are refused. Creations continue with the number that they bring, or with
a number of this instance's own series ("J1-0007"), and with a change id that covers the number.
"""
