"""What is installed, what of it works here, and what to install."""
