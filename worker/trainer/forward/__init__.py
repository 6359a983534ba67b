"""From batches to log-likelihoods: layout, forward pass, chunked head, CPU threads, fallback when memory runs out."""
