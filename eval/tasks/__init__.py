"""The tasks that come with this project: lmms-eval's YAML, local data, nothing to download."""
