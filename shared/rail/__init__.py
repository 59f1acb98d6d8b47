"""The commit: how a change becomes durable and visible, once.

    claim   (mirror)   one script takes (entity, next version) and stores the whole event in the claim
    record  (broker)   the event, confirmed by the quorum queue of its lane; else the journal of this instance
    reveal  (mirror)   the state, guarded by (version, change id); the claim goes

States of a change, and what a crash in each leaves behind:

| state     | mirror        | broker or journal | its owner dies here, or stalls                                  | a reader sees |
|-----------|---------------|-------------------|------------------------------------------------------------------|---------------|
| drafted   | -             | -                 | nothing happened                                                 | old           |
| claimed   | claim         | -                 | after 2 s the next writer, or the reconciler, records and        | old           |
|           |               |                   | reveals the same event: it happens late, once                    |               |
| sent      | claim         | perhaps           | the same: recorded twice is recorded once (same change id)       | old           |
| journaled | claim         | journal           | the same; and the journal is drained: by its instance when it    | old           |
|           |               |                   | returns, or by another that lives beside it (orphans.py)         |               |
| recorded  | claim         | yes               | the same; or the mirror writer meets it in the log               | old           |
| revealed  | state         | yes               | done; the reply was lost, a repeat with its key finds it         | new           |

Ways out that are not a 2xx:

| outcome | when | what is true afterwards |
|---------|------|--------------------------|
| 409     | another change stands, or is on its way       | nothing of ours was claimed |
| 503     | nothing was sent and the claim was taken back | no reader will ever see it  |
| 504     | something was sent, or a claim may stand      | it may appear; repeat with the same Idempotency-Key |

Rules: a claim does not expire, and no other change takes its version while it exists (with a lease, a stalled owner and
its successor could both record that version). A marked claim cannot be taken back. After the first byte was sent, the
commit only goes forward. Every step may be repeated, because the change id identifies the change.

A claim is valid only for the life of its Redis process. A claim that comes back with a restart or a failover is dropped,
because it may have been taken back and answered with 503 after that copy was made. Its owner, if alive, goes on without it.

Without a warm mirror there are no claims: changes are refused, and creations go on with a number of this instance's own
series ("J1-0007") and a change id that covers the number.
"""
