"""Celery workers: claim a job, hold its lease, run a trainer child, publish what it made. No torch outside trainer/."""
