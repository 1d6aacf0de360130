"""A student for other programs: HTTP, MCP, and collections to search."""
