"""Terminal, files, child processes, machine. Imports nothing of freeexport."""
