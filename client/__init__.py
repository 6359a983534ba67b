"""The `milliner` command: the stock `openai` client and plain downloads. Knows neither api nor worker."""
