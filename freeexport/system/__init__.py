"""Terminal, files, child processes and the machine. Imports nothing else of freeexport."""
