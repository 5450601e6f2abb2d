"""A shop (customers, orders, stock) on pgtoolset. `python -m examples.shop.demo` starts it and
gives a tour."""
