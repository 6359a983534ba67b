"""Measurements that the documents quote. Must not be imported by the product."""
