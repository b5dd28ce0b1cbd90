"""The commands: the only place that knows of a command line and of Hydra's start."""
