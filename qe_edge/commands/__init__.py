"""The commands, by stage. Each is a thin wrapper that imports its verb when it is called."""
