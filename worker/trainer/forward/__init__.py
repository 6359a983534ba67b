"""From batches to log-likelihoods: layout, forward pass, chunked head, threads, fallback when memory runs out."""
