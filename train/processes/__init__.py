"""Many processes: their group, their failures, their signals, and the directory that one run owns."""
