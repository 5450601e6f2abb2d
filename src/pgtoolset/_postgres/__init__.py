"""What only PostgreSQL and its driver know."""
