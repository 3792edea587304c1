"""Doors for agents that are no Python: an MCP server, and a folder that is kept in step with an episode."""
