"""The ``cupyinfer`` command: one module for each subcommand (see ``main.COMMANDS``)."""
