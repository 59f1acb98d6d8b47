"""What people would use instead of the rail, each built as well as its design allows."""
