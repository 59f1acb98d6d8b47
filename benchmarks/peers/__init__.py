"""The systems that people would use instead of the rail. Each is built as well as its design allows."""
