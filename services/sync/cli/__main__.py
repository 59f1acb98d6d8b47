"""`python -m services.sync.cli`: the command `ticketrail`."""

from services.sync.cli.main import main

if __name__ == "__main__":
    main(prog_name="ticketrail")
