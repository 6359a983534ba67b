"""Celery workers: claim a job, renew its lease, run a trainer child, publish the result. No torch outside trainer/."""
