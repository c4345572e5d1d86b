"""What a process is among others: its rank, its files, how it is stopped, watched and told
about."""
