"""What people would use instead: each does the same work for the same request, as well as it can be done that way."""
