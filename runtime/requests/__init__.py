"""Prompt + options -> request -> response, sync and asyncio."""
