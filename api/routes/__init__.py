"""The endpoints, one module per resource. An endpoint validates its request and calls into `shared`."""
