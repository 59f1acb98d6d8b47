"""Dead letters: operators find, replay, repair, discard and restore changes that no retry can write.

Guarantee: a message leaves its dead-letter queue only after its dead letters are committed, and every operator action
is committed together with its row in `audit`. An action is refused unless the operator saw the newest revision of the
dead letter.

    collector.py      moves messages from the dead-letter queues into the table `dead_letters`
    store.py          reads dead letters: a list, groups, or one with all its columns
    view.py           assembles everything that is known about one dead letter
    actions.py        the SQL of discard, restore and replace, each with its audit row
    editing.py        checks an operator's event against the contract; pure
    repairs.py        edits, discards and restores dead letters; may commit a change
    replay_jobs.py    makes, reads, cancels and undoes jobs: replays, dry runs, discards, restores
    replay_worker.py  runs jobs in the worker; its SQL is in replay_sql.py
    dry_run.py        forecasts what a replay would do
    retention.py      removes dead letters and replay jobs that were closed long ago
    routes.py, requests.py    the HTTP API
    commands.py, edit_command.py, job_commands.py, command_filters.py    `ticketrail dlq`

Others may use: `collector` and `replay_worker` (the worker), `retention` (maintenance), `routes` (api.py), `commands`
(the command line). The rest is internal. `failures/dead_letter_store.py` stores dead letters.
"""
