"""What this machine is, and how the lab runs on it: device and dtype, Triton's interpreter, memory, files."""
