"""Faults at random times under load, and the proof afterwards that nothing was lost or doubled. The schedule follows
from a seed: `make chaos SEED=7` runs it again.

    schedule.py   which faults, when: pure
    rig.py        the system under test, behind proxies, and how each fault begins and ends
    load.py       creations, concurrent changes, payments, repeats; remembers what was answered
    watch.py      a screen of each restaurant
    run.py        all of it at once, from the first fault to the proof
    rest.py       nothing is on its way any more
    seen.py       what all stores hold then
    proof.py      what must be true of it: pure
"""
