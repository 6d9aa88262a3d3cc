"""Media: pictures and videos, from a path, URL or bytes to tiles."""
