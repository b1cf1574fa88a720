"""What this machine is, and how the lab runs on it: device and dtype, interpreter, memory, files; a table of GPUs."""
