"""The trainer and the commands: configuration, files, signals and the clock."""
