"""The message broker, used as a doorbell: a message says "this queue has work" and nothing else.

Owns: the Celery configuration and the Redis transport. Must not know jobs.
"""
