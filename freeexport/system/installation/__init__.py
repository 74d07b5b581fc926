"""Checks the installation and says what to install."""
