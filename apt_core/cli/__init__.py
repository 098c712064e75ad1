"""The commands. Each file is one command and thin; none imports torch before it must."""
