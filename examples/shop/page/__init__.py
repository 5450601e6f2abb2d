"""The page of the shop: what happens in it, live, and buttons that make it happen."""
