"""The commands, one file per verb. Each is a thin wrapper that imports its verb when it is called."""
