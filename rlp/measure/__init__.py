"""What a run has cost and gained, and what it will cost: ledger, plan, metrics, panel, probe,
report."""
