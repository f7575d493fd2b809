"""What is fast, measured: each case writes one JSON file under `results/`, from which the tables are made."""
