"""Proof that blocks tell the truth through a failover: a Patroni cluster, a load and faults."""
