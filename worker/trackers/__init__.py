"""Report a job's metrics to Weights & Biases or MLflow.

`supervisor` runs in the worker; everything else runs in a child process that holds the secret of one tracker.
"""
