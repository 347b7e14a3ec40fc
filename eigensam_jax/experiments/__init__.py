"""The `eigensam` command: real networks on real data, and what each optimizer did."""
